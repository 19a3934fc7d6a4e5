-- Clean-up: each statement sweeps a range of a table's blocks, so that it costs the same in a table of any size, and
-- passes over rows that somebody else has locked, so that it waits for nobody.

-- name: lock_cursor
-- Take a table's cursor, unless another replica is sweeping that table now; blocks is the table's size.
with made as (
  insert into onetime.sweep_cursors (table_name) values (%(table_name)s)
  on conflict (table_name) do nothing
)
select
  c.next_block,
  pg_relation_size(c.table_name::regclass) / current_setting('block_size')::int as blocks
from onetime.sweep_cursors as c
where c.table_name = %(table_name)s
for update skip locked

-- name: move_cursor
-- Say where the next sweep of a table begins.
update onetime.sweep_cursors set next_block = %(next_block)s where table_name = %(table_name)s

-- name: count_blocks
-- How many blocks a table has.
select pg_relation_size(%(table_name)s::regclass) / current_setting('block_size')::int as blocks

-- name: limit_time
-- Give up rather than make a request wait.
select set_config('lock_timeout', '100', true), set_config('statement_timeout', '2000', true)

-- name: sweep_one_time_tokens
-- Expired tokens of ours. Without its state, a token lives as long as its type may at most.
with dead as materialized (
  select t.id, t.user_id, t.token_type
  from auth.one_time_tokens as t
  left join onetime.one_time_token_states as s
    on s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
  where t.ctid >= %(first)s::tid and t.ctid < %(end)s::tid
    and t.token_hash ~ '^ot[lch]1\.[a-z0-9]{1,16}\.'
    and t.created_at + coalesce(s.ttl, make_interval(secs => %(longest_ttl)s))
      <= clock_timestamp() at time zone 'utc'
  for update of t skip locked
), token as (
  delete from auth.one_time_tokens as t using dead as d where t.id = d.id
), state as (
  delete from onetime.one_time_token_states as s using dead as d
  where s.user_id = d.user_id and s.token_type = d.token_type and s.token_id = d.id
)
select count(*) as removed from dead

-- name: sweep_email_verification_tokens
-- Expired verifications of ours; used and cancelled ones after their retention.
with dead as materialized (
  select t.id, t.email_verification_token as token_hash
  from public.email_verification_tokens as t
  where t.ctid >= %(first)s::tid and t.ctid < %(end)s::tid
    and t.email_verification_token ~ '^ev1\.[a-z0-9]{1,16}\.'
    and case
      when t.used_at is not null then t.used_at + make_interval(secs => %(retention)s) <= clock_timestamp()
      when t.deleted_at is not null then t.deleted_at + make_interval(secs => %(retention)s) <= clock_timestamp()
      else t.expires_at <= clock_timestamp()
    end
  for update of t skip locked
), token as (
  delete from public.email_verification_tokens as t using dead as d where t.id = d.id
), state as (
  delete from onetime.email_verification_states as s using dead as d where s.token_hash = d.token_hash
)
select count(*) as removed from dead

-- name: sweep_one_time_token_states
-- States whose token the host has deleted. The grace is for a token that is replaced while this looks: the state that
-- is then locked is younger than what was seen of its token.
with dead as materialized (
  select s.user_id, s.token_type
  from onetime.one_time_token_states as s
  where s.ctid >= %(first)s::tid and s.ctid < %(end)s::tid
    and s.created_at <= clock_timestamp() - make_interval(secs => %(grace)s)
    and not exists (select from auth.one_time_tokens as t where t.id = s.token_id)
  for update of s skip locked
), state as (
  delete from onetime.one_time_token_states as s using dead as d
  where s.user_id = d.user_id and s.token_type = d.token_type
)
select count(*) as removed from dead

-- name: sweep_email_verification_states
-- States whose verification the host has deleted; the grace as above.
with dead as materialized (
  select s.token_hash
  from onetime.email_verification_states as s
  where s.ctid >= %(first)s::tid and s.ctid < %(end)s::tid
    and s.created_at <= clock_timestamp() - make_interval(secs => %(grace)s)
    and not exists (select from public.email_verification_tokens as t where t.id = s.id)
  for update of s skip locked
), state as (
  delete from onetime.email_verification_states as s using dead as d where s.token_hash = d.token_hash
)
select count(*) as removed from dead

-- name: sweep_receipts
-- Receipts after their retention.
with dead as materialized (
  select r.request_id, r.rpc, r.caller
  from onetime.receipts as r
  where r.ctid >= %(first)s::tid and r.ctid < %(end)s::tid
    and r.created_at + make_interval(secs => %(receipt_retention)s) <= clock_timestamp()
  for update of r skip locked
), receipt as (
  delete from onetime.receipts as r using dead as d
  where r.request_id = d.request_id and r.rpc = d.rpc and r.caller = d.caller
)
select count(*) as removed from dead
