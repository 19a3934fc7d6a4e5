-- Clean-up: each statement sweeps a range of a table's blocks, so that it costs the same in a table of any size, and
-- passes over rows that somebody else has locked, so that it waits for nobody. A token and its state go together.
--
-- Left to itself, the planner would join a range of one table with the whole of another, or look for the rows that it
-- has just found by reading the table again. So rows are deleted by their places (ctid), and other tables are asked row
-- by row: `offset 0` and scalar subqueries are not joined. A row that is changed while a statement looks at it gets a
-- new place, at which the statement does not see it, and so it stays. The pattern that tells our rows from others', which
-- costs more than all else, stands in a `case`, to be tried last.

-- name: lock_cursor
-- Take a table's cursor, unless another replica is sweeping that table now; blocks is the table's size. An insert that
-- meets a row which is being updated would wait, so it is tried only where there is none.
with made as (
  insert into onetime.sweep_cursors (table_name)
  select %(table_name)s
  where not exists (select from onetime.sweep_cursors as c where c.table_name = %(table_name)s)
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

-- name: join_by_hash
-- Let this transaction compare what it has found by hash, other than what every connection sets (configure_session): pair
-- by pair, a sweep of ten thousand dead rows would take half a minute, and never come to its end.
select set_config('enable_hashjoin', 'on', true)

-- name: sweep_one_time_tokens
-- Expired tokens of ours, with their states. Without its state, a token lives as long as any type may at most.
with dead as materialized (
  select t.id, t.ctid as place, s.place as state_place
  from auth.one_time_tokens as t
  left join lateral (
    select s.ctid as place, s.ttl
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s on true
  where t.ctid >= %(first)s::tid and t.ctid < %(end)s::tid
    and case
      when t.created_at + coalesce(s.ttl, make_interval(secs => %(longest_ttl)s))
        <= clock_timestamp() at time zone 'utc'
      then t.token_hash ~ '^ot[lch]1\.[a-z0-9]{1,16}\.'
    end
  for update of t skip locked
), locked_state as materialized (
  select s.ctid as place
  from onetime.one_time_token_states as s
  where s.ctid = any (array(select d.state_place from dead as d))
  for update of s skip locked
), token as (
  delete from auth.one_time_tokens as t
  where t.ctid = any (array(
    select d.place from dead as d left join locked_state as l on l.place = d.state_place
    where d.state_place is null or l.place is not null
  ))
  returning t.id
), state as (
  delete from onetime.one_time_token_states as s
  where s.ctid = any (array(select d.state_place from dead as d join token using (id)))
)
select count(*) as removed from token

-- name: sweep_email_verification_tokens
-- Expired verifications of ours, with their states and mails; used and cancelled ones after their retention. A mail that the
-- courier has locked goes later, by sweep_outbox.
with dead as materialized (
  select t.id, t.ctid as place, s.place as state_place
  from public.email_verification_tokens as t
  left join lateral (
    select s.ctid as place
    from onetime.email_verification_states as s
    where s.id = t.id
    offset 0
  ) as s on true
  where t.ctid >= %(first)s::tid and t.ctid < %(end)s::tid
    and case
      when case
        when t.used_at is not null then t.used_at + make_interval(secs => %(retention)s)
        when t.deleted_at is not null then t.deleted_at + make_interval(secs => %(retention)s)
        else t.expires_at
      end <= clock_timestamp()
      then t.email_verification_token ~ '^ev1\.[a-z0-9]{1,16}\.'
    end
  for update of t skip locked
), locked_state as materialized (
  select s.ctid as place
  from onetime.email_verification_states as s
  where s.ctid = any (array(select d.state_place from dead as d))
  for update of s skip locked
), token as (
  delete from public.email_verification_tokens as t
  where t.ctid = any (array(
    select d.place from dead as d left join locked_state as l on l.place = d.state_place
    where d.state_place is null or l.place is not null
  ))
  returning t.id
), state as (
  delete from onetime.email_verification_states as s
  where s.ctid = any (array(select d.state_place from dead as d join token using (id)))
), locked_mail as materialized (
  select o.ctid as place
  from onetime.outbox as o
  where o.verification_id = any (array(select token.id from token))
  for update of o skip locked
), mail as (
  delete from onetime.outbox as o
  where o.ctid = any (array(select l.place from locked_mail as l))
)
select count(*) as removed from token

-- name: sweep_one_time_token_states
-- States whose token the host has deleted. The grace is for a token that is replaced while this looks: the state that
-- is then locked is younger than what was seen of its token.
with dead as materialized (
  select s.ctid as place
  from onetime.one_time_token_states as s
  where s.ctid >= %(first)s::tid and s.ctid < %(end)s::tid
    and s.created_at <= clock_timestamp() - make_interval(secs => %(grace)s)
    and (select true from auth.one_time_tokens as t where t.id = s.token_id) is null
  for update of s skip locked
), state as (
  delete from onetime.one_time_token_states as s
  where s.ctid = any (array(select d.place from dead as d))
  returning true
)
select count(*) as removed from state

-- name: sweep_email_verification_states
-- States whose verification the host has deleted; the grace as above.
with dead as materialized (
  select s.ctid as place
  from onetime.email_verification_states as s
  where s.ctid >= %(first)s::tid and s.ctid < %(end)s::tid
    and s.created_at <= clock_timestamp() - make_interval(secs => %(grace)s)
    and (select true from public.email_verification_tokens as t where t.id = s.id) is null
  for update of s skip locked
), state as (
  delete from onetime.email_verification_states as s
  where s.ctid = any (array(select d.place from dead as d))
  returning true
)
select count(*) as removed from state

-- name: sweep_outbox
-- Mails whose verification the host has deleted; the grace as above.
with dead as materialized (
  select o.ctid as place
  from onetime.outbox as o
  where o.ctid >= %(first)s::tid and o.ctid < %(end)s::tid
    and o.queued_at <= clock_timestamp() - make_interval(secs => %(grace)s)
    and (select true from public.email_verification_tokens as t where t.id = o.verification_id) is null
  for update of o skip locked
), mail as (
  delete from onetime.outbox as o
  where o.ctid = any (array(select d.place from dead as d))
  returning true
)
select count(*) as removed from mail

-- name: sweep_receipts
-- Receipts after their retention.
with dead as materialized (
  select r.ctid as place
  from onetime.receipts as r
  where r.ctid >= %(first)s::tid and r.ctid < %(end)s::tid
    and r.created_at + make_interval(secs => %(receipt_retention)s) <= clock_timestamp()
  for update of r skip locked
), receipt as (
  delete from onetime.receipts as r
  where r.ctid = any (array(select d.place from dead as d))
  returning true
)
select count(*) as removed from receipt

-- name: sweep_budgets
-- Budgets that bound nothing any more. A budget stays as long as a token may live that was issued under it, so that of two
-- guesses at once neither finds none. A run of wrong codes is forgotten after a year without one.
with dead as materialized (
  select b.ctid as place
  from onetime.budgets as b
  where b.ctid >= %(first)s::tid and b.ctid < %(end)s::tid
    and coalesce(b.sends[cardinality(b.sends)] + make_interval(secs => %(longest_send)s) <= clock_timestamp(), true)
    and coalesce(
      b.failures[cardinality(b.failures)]
        + case
          when b.failures_in_a_row > 0 then make_interval(secs => %(longest_run)s)
          else make_interval(secs => %(longest_failure)s)
        end
        <= clock_timestamp(),
      true
    )
  for update of b skip locked
), budget as (
  delete from onetime.budgets as b
  where b.ctid = any (array(select d.place from dead as d))
  returning true
)
select count(*) as removed from budget
