-- One-time tokens. Every statement takes arrays and answers for each element by its ord, so that calls that arrive
-- together can share a trip. Rows are locked in the order of (user_id, token_type): those of onetime.budgets before those
-- of auth.one_time_tokens, and these before those of onetime.one_time_token_states.
--
-- A token expires at created_at + ttl. Both timestamps hold UTC without a zone, so they are held against
-- clock_timestamp() at time zone 'utc'; now() would be the transaction's start, before any wait for a lock.
--
-- A row is ours if its secret has our format and its state is there; others are never touched.

-- name: issue_tokens
-- Make tokens, each in place of the user's token of that type: the new one has a new id, new times and no attempts.
with request as materialized (
  select r.*, clock_timestamp() at time zone 'utc' as now
  from unnest(
    %(ids)s::uuid[], %(user_ids)s::uuid[], %(token_types)s::auth.one_time_token_type[], %(token_hashes)s::text[],
    %(relates_to)s::text[], %(ttls)s::float8[], %(callers)s::text[]
  ) as r (id, user_id, token_type, token_hash, relates_to, ttl, caller)
  order by r.user_id, r.token_type
), token as (
  insert into auth.one_time_tokens as t (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)
  select id, user_id, token_type, token_hash, relates_to, now, now from request
  on conflict (user_id, token_type) do update set
    id = excluded.id,
    token_hash = excluded.token_hash,
    relates_to = excluded.relates_to,
    created_at = excluded.created_at,
    updated_at = excluded.updated_at
  returning t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, t.created_at, t.updated_at
), counted as materialized (
  select count(*) as tokens from token -- so that tokens are locked before states, as everywhere
), state as (
  insert into onetime.one_time_token_states as s (user_id, token_type, token_id, ttl, caller)
  select user_id, token_type, id, make_interval(secs => ttl), caller
  from request
  where (select tokens from counted) > 0
  on conflict (user_id, token_type) do update set
    token_id = excluded.token_id,
    ttl = excluded.ttl,
    failed_attempts = 0,
    caller = excluded.caller,
    created_at = excluded.created_at
)
select
  t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, 0 as failed_attempts,
  t.created_at at time zone 'utc' as create_time,
  t.updated_at at time zone 'utc' as update_time
from token as t

-- name: refresh_tokens
-- Give live tokens a fresh secret in place of one that its caller never got: same id, times and attempts.
with request as (
  select * from unnest(%(ids)s::uuid[], %(token_hashes)s::text[]) with ordinality as r (id, token_hash, ord)
), locked as materialized (
  select
    r.ord, r.token_hash as fresh_hash, t.id, t.user_id, t.token_type, t.relates_to, t.created_at, t.updated_at,
    s.ttl, s.failed_attempts
  from request as r
  join auth.one_time_tokens as t on t.id = r.id and t.id = any (%(ids)s::uuid[]) and t.token_hash ~ '^ot[lch]1\.'
  cross join lateral (
    select s.ttl, s.failed_attempts
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s
  order by (t.user_id, t.token_type)
  for update of t
), live as materialized (
  select * from locked where created_at + ttl > clock_timestamp() at time zone 'utc'
), token as (
  update auth.one_time_tokens as t
  set token_hash = l.fresh_hash
  from live as l
  where t.id = l.id and t.id = any (array(select l.id from live as l))
  returning t.id
)
select
  l.ord, l.id, l.user_id, l.token_type, l.fresh_hash as token_hash, l.relates_to, l.failed_attempts,
  l.created_at at time zone 'utc' as create_time,
  l.updated_at at time zone 'utc' as update_time,
  (l.created_at + l.ttl) at time zone 'utc' as expire_time,
  t.id is null as expired
from locked as l
left join token as t using (id)

-- name: find_links
-- Find the tokens of links, each by what may be stored for it under any key of the ring.
with request as (
  select * from unnest(
    %(ords)s::int[], %(token_types)s::auth.one_time_token_type[], %(token_hashes)s::text[]
  ) as r (ord, token_type, token_hash)
)
select
  r.ord, t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, s.failed_attempts,
  t.created_at at time zone 'utc' as create_time,
  t.updated_at at time zone 'utc' as update_time,
  (t.created_at + s.ttl) at time zone 'utc' as expire_time,
  t.created_at + s.ttl <= clock_timestamp() at time zone 'utc' as expired
from request as r
join auth.one_time_tokens as t on t.token_hash = r.token_hash and t.token_hash = any (%(token_hashes)s::text[])
  and t.token_type::text = r.token_type::text
cross join lateral (
  select s.ttl, s.failed_attempts
  from onetime.one_time_token_states as s
  where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
  offset 0
) as s

-- name: consume_links
-- Spend the tokens of links: of many callers with one link, the first to lock its row deletes it, and the others find
-- nothing. Whether it has expired is asked after the lock, since the wait for it may outlast the token. What has a
-- request_id is spent only if its receipt was made just now: otherwise an earlier try was answered. Without an id comes
-- what is there and was not locked, by somebody else's lock or because it is gone.
with request as materialized (
  select r.*
  from unnest(
    %(ords)s::int[], %(token_types)s::auth.one_time_token_type[], %(token_hashes)s::text[],
    %(callers)s::text[], %(request_ids)s::uuid[]
  ) as r (ord, token_type, token_hash, caller, request_id)
  where r.request_id is null or (
    select p.retries = 0
    from onetime.receipts as p
    where p.request_id = r.request_id and p.rpc = 'ConsumeToken' and p.caller = r.caller
  )
), found as materialized (
  select r.ord, t.id, t.user_id, t.token_type, t.token_hash
  from request as r
  join auth.one_time_tokens as t
    on t.token_hash = r.token_hash and t.token_hash = any (%(token_hashes)s::text[])
    and t.token_type::text = r.token_type::text
  cross join lateral (
    select s.token_id
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s
), locked as materialized (
  select
    f.ord, t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, t.created_at, t.updated_at,
    s.ttl, s.failed_attempts
  from found as f
  join auth.one_time_tokens as t
    on t.id = f.id and t.id = any (array(select f.id from found as f)) and t.token_hash = f.token_hash
  cross join lateral (
    select s.ttl, s.failed_attempts
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s
  order by f.user_id, f.token_type
  for update of t /* skip locked */
), judged as materialized (
  select *, created_at + ttl <= clock_timestamp() at time zone 'utc' as expired from locked
), first as materialized (
  -- One link twice in a set is one success too.
  select distinct on (id) ord, id from judged where not expired order by id, ord
), token as (
  delete from auth.one_time_tokens as t where t.id = any (array(select f.id from first as f))
  returning t.id, t.user_id, t.token_type
), state as (
  delete from onetime.one_time_token_states as s using token as t
  where s.user_id = t.user_id and s.user_id = any (array(select t.user_id from token as t))
    and s.token_type = t.token_type and s.token_id = t.id
)
select
  f.ord, j.id, j.user_id, j.token_type, j.token_hash, j.relates_to, j.failed_attempts, j.expired,
  j.created_at at time zone 'utc' as create_time,
  j.updated_at at time zone 'utc' as update_time,
  (j.created_at + j.ttl) at time zone 'utc' as expire_time
from found as f
left join judged as j using (ord)
left join first as i on i.ord = j.ord
left join token as t on t.id = i.id
where j.id is null or j.expired or t.id is not null

-- name: lock_codes
-- Find and lock the token that each code was presented for, with the budget of its subject, budgets first: of any number
-- of guesses at once, each sees the counts that the one before it left. By an address, the newest live code is meant;
-- where none is live, the newest. `skipped` is what is there and was not locked: by somebody else's lock where the
-- statement passes over these, otherwise because it is gone.
with request as (
  select * from unnest(
    %(ords)s::int[], %(token_types)s::auth.one_time_token_type[], %(user_ids)s::uuid[], %(relates_to)s::text[]
  ) as r (ord, token_type, user_id, relates_to)
), found as materialized (
  select r.ord, c.*
  from request as r
  cross join lateral (
    (
      select t.id, t.user_id, t.token_type
      from auth.one_time_tokens as t
      cross join lateral (
        select s.ttl
        from onetime.one_time_token_states as s
        where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
        offset 0
      ) as s
      where r.user_id is not null
        and t.user_id = r.user_id and t.token_type = r.token_type and t.token_hash ~ '^ot[ch]1\.'
    )
    union all
    (
      select t.id, t.user_id, t.token_type
      from auth.one_time_tokens as t
      cross join lateral (
        select s.ttl
        from onetime.one_time_token_states as s
        where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
        offset 0
      ) as s
      where r.user_id is null
        and t.relates_to = r.relates_to and t.token_type = r.token_type and t.token_hash ~ '^ot[ch]1\.'
      order by t.created_at + s.ttl > clock_timestamp() at time zone 'utc' desc, t.created_at desc, t.id
      limit 1
    )
  ) as c
), budget as materialized (
  select b.user_id, b.purpose, b.failures, b.failures_in_a_row
  from onetime.budgets as b
  where b.user_id = any (array(select f.user_id from found as f))
    and (b.user_id, b.purpose) in (select f.user_id, f.token_type::text from found as f)
  order by b.user_id, b.purpose
  for update of b /* skip locked */
), locked as materialized (
  select
    f.ord, t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, t.created_at, t.updated_at,
    s.ttl, s.failed_attempts
  from found as f
  join auth.one_time_tokens as t on t.id = f.id and t.id = any (array(select f.id from found as f))
  join onetime.one_time_token_states as s
    on s.user_id = f.user_id and s.user_id = any (array(select f.user_id from found as f))
    and s.token_type = f.token_type and s.token_id = f.id
  where (select count(*) from budget) >= 0 -- which makes that come first
  order by f.user_id, f.token_type
  for update of t, s /* skip locked */
)
select
  f.ord, f.id, f.user_id, f.token_type, l.token_hash, l.relates_to, l.failed_attempts,
  l.created_at at time zone 'utc' as create_time,
  l.updated_at at time zone 'utc' as update_time,
  (l.created_at + l.ttl) at time zone 'utc' as expire_time,
  l.created_at + l.ttl <= clock_timestamp() at time zone 'utc' as expired,
  b.failures, b.failures_in_a_row, clock_timestamp() as now,
  l.id is null or b.user_id is null and exists (
    select from onetime.budgets as e where e.user_id = f.user_id and e.purpose = f.token_type::text
  ) as skipped
from found as f
left join locked as l using (ord)
left join budget as b on b.user_id = f.user_id and b.purpose = f.token_type::text

-- name: charge_codes
-- Count an attempt on tokens that this transaction has locked, before anybody compares it.
update onetime.one_time_token_states as s
set failed_attempts = s.failed_attempts + 1
from unnest(
  %(user_ids)s::uuid[], %(token_types)s::auth.one_time_token_type[], %(ids)s::uuid[]
) as r (user_id, token_type, id)
where s.user_id = r.user_id and s.user_id = any (%(user_ids)s::uuid[])
  and s.token_type = r.token_type and s.token_id = r.id

-- name: refund_codes
-- Give charges back: the code was right, or could not be compared.
update onetime.one_time_token_states as s
set failed_attempts = greatest(s.failed_attempts - 1, 0)
from unnest(
  %(user_ids)s::uuid[], %(token_types)s::auth.one_time_token_type[], %(ids)s::uuid[]
) as r (user_id, token_type, id)
where s.user_id = r.user_id and s.user_id = any (%(user_ids)s::uuid[])
  and s.token_type = r.token_type and s.token_id = r.id

-- name: find_codes
-- Find codes by their ids, for a retry that finds its charge pending.
select
  r.ord, t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, s.failed_attempts,
  t.created_at at time zone 'utc' as create_time,
  t.updated_at at time zone 'utc' as update_time,
  (t.created_at + s.ttl) at time zone 'utc' as expire_time,
  t.created_at + s.ttl <= clock_timestamp() at time zone 'utc' as expired
from unnest(%(ids)s::uuid[]) with ordinality as r (id, ord)
join auth.one_time_tokens as t on t.id = r.id and t.id = any (%(ids)s::uuid[]) and t.token_hash ~ '^ot[ch]1\.'
cross join lateral (
  select s.ttl, s.failed_attempts
  from onetime.one_time_token_states as s
  where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
  offset 0
) as s

-- name: consume_codes
-- Spend the tokens of codes that were found right: as consume_links does, and only while the row still holds the very
-- secret that the code was compared with.
with request as (
  select * from unnest(%(ids)s::uuid[], %(token_hashes)s::text[]) with ordinality as r (id, token_hash, ord)
), locked as materialized (
  select r.ord, t.id, t.user_id, t.token_type, t.created_at, s.ttl
  from request as r
  join auth.one_time_tokens as t on t.id = r.id and t.token_hash = r.token_hash and t.id = any (%(ids)s::uuid[])
  cross join lateral (
    select s.ttl
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s
  order by (t.user_id, t.token_type)
  for update of t
), judged as materialized (
  select ord, id, created_at + ttl <= clock_timestamp() at time zone 'utc' as expired from locked
), first as materialized (
  select distinct on (id) ord, id from judged where not expired order by id, ord
), token as (
  delete from auth.one_time_tokens as t where t.id = any (array(select f.id from first as f))
  returning t.id, t.user_id, t.token_type
), state as (
  delete from onetime.one_time_token_states as s using token as t
  where s.user_id = t.user_id and s.user_id = any (array(select t.user_id from token as t))
    and s.token_type = t.token_type and s.token_id = t.id
)
select j.ord, j.id, j.expired
from judged as j
left join first as f using (ord, id)
left join token as t on t.id = f.id
where j.expired or t.id is not null

-- name: revoke_tokens
-- Delete users' tokens. Expired ones go too, uncounted.
with request as (
  select * from unnest(
    %(ords)s::int[], %(user_ids)s::uuid[], %(token_types)s::auth.one_time_token_type[]
  ) as r (ord, user_id, token_type)
), locked as materialized (
  select r.ord, t.id, t.user_id, t.token_type, t.created_at, s.ttl
  from request as r
  join auth.one_time_tokens as t
    on t.user_id = r.user_id and t.user_id = any (%(user_ids)s::uuid[])
    and t.token_type = r.token_type and t.token_hash ~ '^ot[lch]1\.'
  cross join lateral (
    select s.ttl
    from onetime.one_time_token_states as s
    where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
    offset 0
  ) as s
  order by t.user_id, t.token_type
  for update of t
), token as (
  delete from auth.one_time_tokens as t using locked as l where t.id = l.id
), state as (
  delete from onetime.one_time_token_states as s using locked as l
  where s.user_id = l.user_id and s.token_type = l.token_type and s.token_id = l.id
)
select
  ord, count(*) filter (where created_at + ttl > clock_timestamp() at time zone 'utc') as revoked_count
from locked
group by ord

-- name: list_tokens
-- List users' tokens that have not expired.
select
  r.ord, t.id, t.user_id, t.token_type, t.token_hash, t.relates_to, s.failed_attempts,
  t.created_at at time zone 'utc' as create_time,
  t.updated_at at time zone 'utc' as update_time,
  (t.created_at + s.ttl) at time zone 'utc' as expire_time
from unnest(%(user_ids)s::uuid[]) with ordinality as r (user_id, ord)
join auth.one_time_tokens as t
  on t.user_id = r.user_id and t.user_id = any (%(user_ids)s::uuid[]) and t.token_hash ~ '^ot[lch]1\.'
cross join lateral (
  select s.ttl, s.failed_attempts
  from onetime.one_time_token_states as s
  where s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
  offset 0
) as s
where t.created_at + s.ttl > clock_timestamp() at time zone 'utc'
order by r.ord, t.token_type
