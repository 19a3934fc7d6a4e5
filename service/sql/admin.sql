-- What is done to a user as a whole. Every statement takes arrays, an element a user or a subject.

-- name: purge_users
-- Delete all of these users' rows from both tables, ours and others', and what belongs to them. Rows are locked in the
-- order that everybody keeps.
with token as materialized (
  select t.id, t.user_id
  from auth.one_time_tokens as t
  where t.user_id = any (%(user_ids)s::uuid[])
  order by t.user_id, t.token_type
  for update of t
), verification as materialized (
  select t.id, t.user_id, t.email_verification_token
  from public.email_verification_tokens as t
  where t.user_id = any (%(user_ids)s::uuid[]) and (select count(*) from token) >= 0 -- which makes that come first
  order by t.id
  for update of t
), purged_token as (
  delete from auth.one_time_tokens as t using token as d where t.id = d.id
), purged_verification as (
  delete from public.email_verification_tokens as t using verification as d where t.id = d.id
), token_state as (
  delete from onetime.one_time_token_states as s where s.user_id = any (%(user_ids)s::uuid[])
), verification_state as (
  delete from onetime.email_verification_states as s
  using verification as d
  where s.token_hash = d.email_verification_token
), receipt as (
  delete from onetime.receipts as r
  where r.row_id in (select id from token union all select id from verification)
)
select
  (select count(*) from token) as one_time_tokens,
  (select count(*) from verification) as email_verifications

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
