-- Mails with codes. Every statement takes arrays, an element a mail. Rows are locked after the tokens that they belong to;
-- the courier, which begins here, holds no lock on a row of the outbox while it waits for one on a token.

-- name: queue_mails
-- Queue the first mail with a code.
insert into onetime.outbox (verification_id, message_id, sealed_address, locale)
select r.verification_id, r.message_id, r.sealed_address, r.locale
from unnest(
  %(verification_ids)s::uuid[], %(message_ids)s::uuid[], %(sealed_addresses)s::bytea[], %(locales)s::text[]
) as r (verification_id, message_id, sealed_address, locale)

-- name: requeue_mails
-- Queue another mail with the same code, in place of the one before, however that stands. What is heard of that one later
-- does not count any more.
update onetime.outbox as o
set message_id = r.message_id, state = 'queued', failure = null, tries = 0, queued_at = clock_timestamp(),
  due_at = clock_timestamp()
from unnest(%(verification_ids)s::uuid[], %(message_ids)s::uuid[]) as r (verification_id, message_id)
where o.verification_id = r.verification_id and o.verification_id = any (%(verification_ids)s::uuid[])
  and o.sealed_address is not null
returning o.verification_id as id, o.state as delivery_state, o.failure as delivery_failure

-- name: end_mails
-- Send no more mails for these verifications, and forget their addresses.
update onetime.outbox as o
set sealed_address = null, due_at = null,
  state = case o.state when 'queued' then 'failed' else o.state end,
  failure = case o.state when 'queued' then 'verification_over' else o.failure end
where o.verification_id = any (%(verification_ids)s::uuid[])
returning o.verification_id as id, o.state as delivery_state, o.failure as delivery_failure

-- name: end_due_mails
-- As end_mails, for those that are due and whose verification is over: used, cancelled, expired, locked, or gone.
with over as materialized (
  select o.verification_id
  from onetime.outbox as o
  left join public.email_verification_tokens as t on t.id = o.verification_id
  left join onetime.email_verification_states as s on s.id = t.id and s.token_hash = t.email_verification_token
  where o.due_at <= statement_timestamp()
    and (
      s.id is null or t.used_at is not null or t.deleted_at is not null or t.expires_at <= clock_timestamp()
      or s.failed_attempts >= %(max_attempts)s
    )
  order by o.due_at
  limit %(count)s
  for update of o skip locked
)
update onetime.outbox as o
set sealed_address = null, due_at = null,
  state = case o.state when 'queued' then 'failed' else o.state end,
  failure = case o.state when 'queued' then 'verification_over' else o.failure end
from over
where o.verification_id = over.verification_id
returning o.verification_id, o.failure

-- name: claim_mails
-- Take mails that are due, for so many seconds: the try is counted before it is made, so that a mail on which a courier dies
-- is not tried for ever. Others pass over what is locked, and find it again when that time is over.
with due as materialized (
  select o.verification_id
  from onetime.outbox as o
  where o.due_at <= statement_timestamp() and o.state = 'queued'
  order by o.due_at
  limit %(count)s
  for update of o skip locked
), claimed as (
  update onetime.outbox as o
  set tries = o.tries + 1, due_at = clock_timestamp() + make_interval(secs => %(lease)s)
  from due
  where o.verification_id = due.verification_id
  returning o.verification_id, o.message_id, o.sealed_address, o.locale, o.tries, o.failure, o.queued_at
)
select
  c.verification_id, c.message_id, c.sealed_address, c.locale, c.tries, c.failure, c.queued_at,
  t.user_id, t.email_verification_token as token_hash, t.code as sealed_code, t.expires_at - clock_timestamp() as time_left
from claimed as c
join public.email_verification_tokens as t on t.id = c.verification_id

-- name: confirm_mails
-- Which of these are still to be sent by this try: their verification is not over, no newer mail took their place, and the
-- time of the claim is not.
select r.ord
from unnest(
  %(verification_ids)s::uuid[], %(message_ids)s::uuid[], %(tries)s::int[]
) with ordinality as r (verification_id, message_id, tries, ord)
join onetime.outbox as o using (verification_id, message_id, tries)
join public.email_verification_tokens as t on t.id = o.verification_id
join onetime.email_verification_states as s on s.id = t.id and s.token_hash = t.email_verification_token
where o.state = 'queued' and o.due_at > clock_timestamp()
  and t.used_at is null and t.deleted_at is null and t.expires_at > clock_timestamp()
  and s.failed_attempts < %(max_attempts)s

-- name: mark_mails_sent
-- Record that the mail server has accepted mails, also of a try whose time was over, and of a mail in whose place another
-- was queued: the code was sent. What is then to be done is to forget the address, at the verification's end.
with sent as materialized (
  select r.verification_id, r.message_id
  from unnest(%(verification_ids)s::uuid[], %(message_ids)s::uuid[]) as r (verification_id, message_id)
), token as (
  update public.email_verification_tokens as t
  set code_sent = true
  from sent
  where t.id = sent.verification_id and not t.code_sent
  returning t.id
)
update onetime.outbox as o
set state = 'sent', failure = null,
  due_at = case when o.sealed_address is not null then coalesce(
    (select t.expires_at from public.email_verification_tokens as t where t.id = o.verification_id),
    clock_timestamp() -- the host has deleted it
  ) end
from sent
where o.verification_id = sent.verification_id and o.message_id = sent.message_id
  and (select count(*) from token) >= 0 -- which makes that come first, as everybody locks
returning extract(epoch from clock_timestamp() - o.queued_at)::float8 as seconds

-- name: mark_mails_failed
-- Record that tries failed. Without a time to wait, no other follows. Of a newer try or mail nothing is changed.
update onetime.outbox as o
set failure = r.failure,
  state = case when r.wait is null then 'failed' else o.state end,
  due_at = case
    when r.wait is null then coalesce(
      (select t.expires_at from public.email_verification_tokens as t where t.id = o.verification_id),
      clock_timestamp() -- as above
    )
    else clock_timestamp() + make_interval(secs => r.wait)
  end
from unnest(
  %(verification_ids)s::uuid[], %(message_ids)s::uuid[], %(tries)s::int[], %(failures)s::text[], %(waits)s::float8[]
) as r (verification_id, message_id, tries, failure, wait)
where o.verification_id = r.verification_id and o.message_id = r.message_id and o.tries = r.tries
  and o.state = 'queued'
returning o.verification_id

-- name: count_queued_mails
-- How many mails are queued, and for how long the oldest has been.
select count(*) as queued, coalesce(extract(epoch from clock_timestamp() - min(o.queued_at)), 0)::float8 as oldest
from onetime.outbox as o
where o.state = 'queued'
