-- What is done to a user as a whole. Every statement takes arrays, an element a user or a subject. PurgeUser runs the first
-- four in one transaction, in the order in which everybody locks: receipts, budgets, tokens.

-- name: purge_receipts
-- Delete the answers kept for these users' tokens and verifications.
delete from onetime.receipts as r
where r.row_id in (
  select t.id from auth.one_time_tokens as t where t.user_id = any (%(user_ids)s::uuid[])
  union all
  select t.id from public.email_verification_tokens as t where t.user_id = any (%(user_ids)s::uuid[])
)

-- name: lock_users
-- Lock all budgets of these users, so that no call about them is under way. They stay.
select b.user_id, b.purpose
from onetime.budgets as b
where b.user_id = any (%(user_ids)s::uuid[])
order by b.user_id, b.purpose
for update of b

-- name: purge_tokens
-- Delete these users' one-time tokens, ours and others', with their states. By user: a token that is replaced meanwhile has
-- another id.
with token as (
  delete from auth.one_time_tokens as t where t.user_id = any (%(user_ids)s::uuid[])
  returning t.id
), state as (
  delete from onetime.one_time_token_states as s where s.user_id = any (%(user_ids)s::uuid[])
)
select count(*) as purged from token

-- name: purge_verifications
-- Delete these users' email verifications, ours and others', with their states and mails.
with verification as (
  delete from public.email_verification_tokens as t where t.user_id = any (%(user_ids)s::uuid[])
  returning t.id
), state as (
  delete from onetime.email_verification_states as s
  using verification as v
  where s.id = v.id
), mail as (
  delete from onetime.outbox as o
  using verification as v
  where o.verification_id = v.id
)
select count(*) as purged from verification

-- name: unlock_subjects
-- Forget wrong codes, and sends but for the newest: the row stays as long as a token may live that was issued under it.
with locked as materialized (
  select b.user_id, b.purpose, b.failures_in_a_row
  from unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
  join onetime.budgets as b using (user_id, purpose)
  order by b.user_id, b.purpose
  for update of b
), unlocked as (
  update onetime.budgets as b
  set failures = '{}', failures_in_a_row = 0, sends = b.sends[greatest(cardinality(b.sends), 1):]
  from locked as l
  where b.user_id = l.user_id and b.purpose = l.purpose
)
select user_id, purpose, failures_in_a_row from locked
