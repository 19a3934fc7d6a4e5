-- Receipts: what is kept for retries. Every statement takes arrays, an element a call.

-- name: claim_receipts
-- Make a receipt, or lock and give the one that is there. The insert waits for a transaction that is making the same one,
-- so that two calls with one request_id are never both the first.
with claimed as (
  insert into onetime.receipts as receipt (caller, rpc, request_id, fingerprint)
  select caller, rpc, request_id, fingerprint
  from unnest(
    %(callers)s::text[], %(rpcs)s::text[], %(request_ids)s::uuid[], %(fingerprints)s::text[]
  ) as request (caller, rpc, request_id, fingerprint)
  order by request_id, rpc, caller
  on conflict (request_id, rpc, caller) do update set retries = receipt.retries + 1
  returning caller, rpc, request_id, fingerprint, row_id, answer, retries
)
select caller, rpc, request_id, fingerprint, row_id, answer from claimed where retries > 0

-- name: settle_receipts
-- Keep the outcome of calls whose receipts this transaction has claimed, or which an earlier one left pending.
update onetime.receipts as receipt
set row_id = request.row_id, answer = request.answer
from unnest(
  %(callers)s::text[], %(rpcs)s::text[], %(request_ids)s::uuid[], %(row_ids)s::uuid[], %(answers)s::bytea[]
) as request (caller, rpc, request_id, row_id, answer)
where receipt.request_id = request.request_id
  and receipt.request_id = any (%(request_ids)s::uuid[])
  and receipt.rpc = request.rpc
  and receipt.caller = request.caller

-- name: drop_receipts
-- Forget calls that failed for a reason of ours.
delete from onetime.receipts as receipt
using unnest(
  %(callers)s::text[], %(rpcs)s::text[], %(request_ids)s::uuid[]
) as request (caller, rpc, request_id)
where receipt.request_id = request.request_id
  and receipt.request_id = any (%(request_ids)s::uuid[])
  and receipt.rpc = request.rpc
  and receipt.caller = request.caller
