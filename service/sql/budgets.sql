-- Budgets: what bounds guesses and sends for one user and purpose. Every statement takes arrays, an element a subject; no
-- subject twice.
--
-- A budget is locked before the tokens of its subject, everywhere: so that calls about one subject queue up here, and never
-- wait for each other in a circle. The times are taken from clock_timestamp(), under that lock, so they stand in order.

-- name: lock_budgets
-- Lock budgets, and make those that are not there: of two calls that are the first for their subject, the second waits
-- here. `do nothing` would lock nothing, and a clean-up could remove an old one before it is read.
insert into onetime.budgets (user_id, purpose)
select user_id, purpose
from unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
order by user_id, purpose
on conflict (user_id, purpose) do update set purpose = excluded.purpose where false

-- name: read_budgets
-- Tell how budgets stand that this transaction has locked.
select b.user_id, b.purpose, b.failures, b.failures_in_a_row, b.sends, false as made, clock_timestamp() as now
from unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
join onetime.budgets as b using (user_id, purpose)
where b.user_id = any (%(user_ids)s::uuid[])

-- name: claim_budgets
-- Make the budgets that are not there, each with the send that it is made for, and lock those that are there, but for what
-- others have locked or have just made: these are left to calls on their own. So a new user's budget is written once. It
-- is told as it was before, without a send, which no limit refuses; for a send that comes to nothing all the same,
-- drop_budgets forgets it. All are made before any is locked: while it waits for others that make or remove the same
-- ones, it holds none but those that it has made, in order.
with subject as materialized (
  select user_id, purpose from unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
), made as (
  insert into onetime.budgets (user_id, purpose, sends)
  select user_id, purpose, array[clock_timestamp()] from subject
  order by user_id, purpose
  on conflict (user_id, purpose) do nothing
  returning user_id, purpose
), locked as materialized (
  select b.user_id, b.purpose, b.failures, b.failures_in_a_row, b.sends
  from subject as s
  cross join lateral (
    select b.user_id, b.purpose, b.failures, b.failures_in_a_row, b.sends
    from onetime.budgets as b
    where b.user_id = s.user_id and b.purpose = s.purpose
    for update of b skip locked
  ) as b
  where (s.user_id, s.purpose) not in (select m.user_id, m.purpose from made as m)
)
select user_id, purpose, failures, failures_in_a_row, sends, false as made, clock_timestamp() as now from locked
union all
select user_id, purpose, '{}', 0, '{}', true, clock_timestamp() from made

-- name: drop_budgets
-- Forget budgets that this transaction has made, for sends that came to nothing.
delete from onetime.budgets as b
using unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
where b.user_id = r.user_id and b.user_id = any (%(user_ids)s::uuid[]) and b.purpose = r.purpose

-- name: spend_sends
-- Count one send on each budget.
insert into onetime.budgets as b (user_id, purpose, sends)
select user_id, purpose, array[clock_timestamp()]
from unnest(%(user_ids)s::uuid[], %(purposes)s::text[]) as r (user_id, purpose)
order by user_id, purpose
on conflict (user_id, purpose) do update set
  sends = (b.sends || clock_timestamp())[greatest(cardinality(b.sends) + 2 - %(keep)s, 1):]

-- name: charge_budgets
-- Count one wrong code on each budget that this transaction has locked.
insert into onetime.budgets as b (user_id, purpose, failures, failures_in_a_row)
select user_id, purpose, array[charged_at], 1
from unnest(
  %(user_ids)s::uuid[], %(purposes)s::text[], %(charged_ats)s::timestamptz[]
) as r (user_id, purpose, charged_at)
order by user_id, purpose
on conflict (user_id, purpose) do update set
  failures = (b.failures || excluded.failures)[greatest(cardinality(b.failures) + 2 - %(keep)s, 1):],
  failures_in_a_row = b.failures_in_a_row + 1

-- name: end_runs
-- A right code: take back its own charge, if it had one, and end the run of wrong ones. Codes that were charged after
-- this one go on being counted: their verdicts are not known here.
update onetime.budgets as b
set
  failures = array_remove(b.failures, r.charged_at),
  failures_in_a_row = (select count(*) from unnest(b.failures) as f (time) where f.time > r.charged_at)
from unnest(
  %(user_ids)s::uuid[], %(purposes)s::text[], %(charged_ats)s::timestamptz[]
) as r (user_id, purpose, charged_at)
where b.user_id = r.user_id and b.user_id = any (%(user_ids)s::uuid[]) and b.purpose = r.purpose

-- name: forget_failures
-- A code that came to no verdict, by a failure of ours: take back its charge, unless it is forgotten already.
update onetime.budgets as b
set
  failures = array_remove(b.failures, r.charged_at),
  failures_in_a_row = greatest(b.failures_in_a_row - 1, 0)
from unnest(
  %(user_ids)s::uuid[], %(purposes)s::text[], %(charged_ats)s::timestamptz[]
) as r (user_id, purpose, charged_at)
where b.user_id = r.user_id and b.user_id = any (%(user_ids)s::uuid[]) and b.purpose = r.purpose
  and r.charged_at = any (b.failures)
