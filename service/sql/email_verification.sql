-- Email verifications. Every statement takes arrays and answers for each element by its ord.
--
-- A row of public.email_verification_tokens is found through onetime.email_verification_states: by the digests that
-- may be stored for the token presented, or by its id. It is ours if that state is there, and names its token; others
-- are never touched.
-- The budget of its user is locked first, then both rows together, in the order of ids, before anything is decided.

-- name: add_users
-- Add users not seen before: only where public.users is our own, made because the database had none.
insert into public.users (id)
select distinct unnest(%(user_ids)s::uuid[])
on conflict (id) do nothing

-- name: find_users
-- Which of these users the host knows.
select u.id from public.users as u where u.id = any (%(user_ids)s::uuid[])

-- name: start_verifications
-- Start verifications of users whom the host knows.
with request as materialized (
  select r.*, clock_timestamp() as now
  from unnest(
    %(ids)s::uuid[], %(user_ids)s::uuid[], %(token_hashes)s::text[], %(sealed_codes)s::text[], %(ttls)s::float8[],
    %(callers)s::text[], %(deliveries)s::text[]
  ) as r (id, user_id, token_hash, sealed_code, ttl, caller, delivery)
), state as (
  insert into onetime.email_verification_states (token_hash, id, caller, delivery)
  select token_hash, id, caller, delivery from request
)
insert into public.email_verification_tokens as t
  (id, user_id, email_verification_token, code, code_sent, created_at, updated_at, expires_at)
select id, user_id, token_hash, sealed_code, false, now, now, now + make_interval(secs => ttl)
from request
returning t.id, t.user_id, t.code_sent, t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at

-- name: find_verifications
-- Find verifications by id, or by what may be stored for a token under any key of the ring: of one caller, or of all
-- where none is named.
select
  r.ord, t.id, t.user_id, t.email_verification_token as token_hash, t.code as sealed_code, t.code_sent,
  t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at,
  s.failed_attempts, s.caller, s.delivery, o.state as delivery_state, o.failure as delivery_failure,
  t.expires_at <= clock_timestamp() as expired
from unnest(
  %(ords)s::int[], %(ids)s::uuid[], %(token_hashes)s::text[], %(callers)s::text[]
) as r (ord, id, token_hash, caller)
cross join lateral (
  select s.id, s.token_hash, s.failed_attempts, s.caller, s.delivery
  from onetime.email_verification_states as s
  where s.id = r.id
  union all
  select s.id, s.token_hash, s.failed_attempts, s.caller, s.delivery
  from onetime.email_verification_states as s
  where s.token_hash = r.token_hash
) as s
cross join lateral (
  select
    t.id, t.user_id, t.email_verification_token, t.code, t.code_sent,
    t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at
  from public.email_verification_tokens as t
  where t.id = s.id and t.email_verification_token = s.token_hash
  offset 0
) as t
left join lateral (
  select o.state, o.failure from onetime.outbox as o where o.verification_id = t.id offset 0
) as o on s.delivery = 'send_email'
where r.caller is null or s.caller = r.caller

-- name: lock_verifications
-- As find_verifications, and lock what is found, with the budgets of its users. Whether it has expired is asked after the
-- lock, since the wait for it may outlast the token. `skipped` is what is there and was not locked: by somebody else's
-- lock where the statement passes over these, otherwise because it is gone.
with found as materialized (
  select r.ord, t.id, t.user_id
  from unnest(
    %(ords)s::int[], %(ids)s::uuid[], %(token_hashes)s::text[], %(callers)s::text[]
  ) as r (ord, id, token_hash, caller)
  cross join lateral (
    select s.id, s.token_hash, s.caller from onetime.email_verification_states as s where s.id = r.id
    union all
    select s.id, s.token_hash, s.caller from onetime.email_verification_states as s where s.token_hash = r.token_hash
  ) as s
  cross join lateral (
    select t.id, t.user_id
    from public.email_verification_tokens as t
    where t.id = s.id and t.email_verification_token = s.token_hash
    offset 0
  ) as t
  where r.caller is null or s.caller = r.caller
), budget as materialized (
  select b.user_id, b.failures, b.failures_in_a_row, b.sends
  from (select distinct f.user_id from found as f order by f.user_id) as f
  cross join lateral (
    select b.user_id, b.failures, b.failures_in_a_row, b.sends
    from onetime.budgets as b
    where b.user_id = f.user_id and b.purpose = 'email_verification'
    for update of b /* skip locked */
  ) as b
), locked as materialized (
  select
    f.ord, t.id, t.user_id, t.email_verification_token as token_hash, t.code as sealed_code, t.code_sent,
    t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at,
    s.failed_attempts, s.caller, s.delivery, s.last_sent_at
  from found as f
  join public.email_verification_tokens as t on t.id = f.id and t.id = any (array(select f.id from found as f))
  join onetime.email_verification_states as s on s.id = any (array[t.id]) and s.token_hash = t.email_verification_token
  where (select count(*) from budget) >= 0 -- which makes that come first
  order by t.id
  for update of t, s /* skip locked */
)
select
  f.ord, f.id, f.user_id, l.token_hash, l.sealed_code, l.code_sent,
  l.created_at, l.updated_at, l.expires_at, l.used_at, l.deleted_at,
  l.failed_attempts, l.caller, l.delivery, l.last_sent_at, o.state as delivery_state, o.failure as delivery_failure,
  l.expires_at <= clock_timestamp() as expired,
  b.failures, b.failures_in_a_row, b.sends, clock_timestamp() as now,
  l.id is null or b.user_id is null and exists (
    select from onetime.budgets as e where e.user_id = f.user_id and e.purpose = 'email_verification'
  ) as skipped
from found as f
left join locked as l using (ord)
left join budget as b on b.user_id = f.user_id
left join lateral (
  select o.state, o.failure from onetime.outbox as o where o.verification_id = l.id offset 0
) as o on l.delivery = 'send_email'

-- name: use_verifications
-- Spend verifications that this transaction has locked and whose codes it has found right.
update public.email_verification_tokens as t
set used_at = clock_timestamp()
where t.id = any (%(ids)s::uuid[])
  and case when t.used_at is null and t.deleted_at is null then t.expires_at > clock_timestamp() end
returning t.id, t.updated_at, t.used_at

-- name: charge_verifications
-- Count a wrong code on verifications that this transaction has locked.
update onetime.email_verification_states as s
set failed_attempts = s.failed_attempts + 1
where s.id = any (%(ids)s::uuid[])

-- name: refresh_verifications
-- Give verifications that this transaction has locked a fresh token in place of one that its caller never got. Their
-- codes stay the same, sealed anew, since the pad is made from the stored token.
with request as (
  select * from unnest(
    %(ids)s::uuid[], %(token_hashes)s::text[], %(sealed_codes)s::text[]
  ) with ordinality as r (id, token_hash, sealed_code, ord)
), state as (
  update onetime.email_verification_states as s
  set token_hash = r.token_hash
  from request as r
  where s.id = r.id and s.id = any (%(ids)s::uuid[])
)
update public.email_verification_tokens as t
set email_verification_token = r.token_hash, code = r.sealed_code
from request as r
where t.id = r.id and t.id = any (%(ids)s::uuid[])
returning r.ord, t.id, t.user_id, t.code_sent, t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at

-- name: mark_resent
-- Record that the codes of verifications that this transaction has locked are sent again.
update onetime.email_verification_states as s
set last_sent_at = clock_timestamp()
where s.id = any (%(ids)s::uuid[])

-- name: mark_codes_sent
-- Record that the codes of verifications that this transaction has locked have been mailed.
update public.email_verification_tokens as t
set code_sent = true
from unnest(%(ids)s::uuid[]) with ordinality as r (id, ord)
where t.id = r.id and t.id = any (%(ids)s::uuid[])
returning r.ord, t.id, t.user_id, t.code_sent, t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at

-- name: cancel_verifications
-- Cancel verifications that this transaction has locked.
update public.email_verification_tokens as t
set deleted_at = clock_timestamp()
from unnest(%(ids)s::uuid[]) with ordinality as r (id, ord)
where t.id = r.id and t.id = any (%(ids)s::uuid[])
returning r.ord, t.id, t.user_id, t.code_sent, t.created_at, t.updated_at, t.expires_at, t.used_at, t.deleted_at
