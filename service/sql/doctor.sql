-- What `onetime doctor` asks. It only reads.

-- name: configure_session
-- A limit on what reading the whole of both tables may take, and times in UTC. The comparison of tables makes temporary
-- ones: its COMMIT must not wait for a standby that is gone, which is one of the things to be found.
select
  set_config('statement_timeout', %(statement_timeout)s, false),
  set_config('timezone', 'UTC', false),
  set_config('synchronous_commit', 'local', false)

-- name: server
-- Which PostgreSQL this is.
select current_setting('server_version') as version

-- name: unset_log_parameters
-- Settings that keep parameters out of the server's log, and that this role may not set: addresses and digests are in
-- the parameters.
select name, current_user as role
from unnest(array['log_error_verbosity', 'log_parameter_max_length', 'log_parameter_max_length_on_error']) as name
where not has_parameter_privilege(current_user, name, 'SET')

-- name: foreign_rows
-- Rows of both tables that another system wrote after onetime took them over.
select a.table_name, count(*) as rows, max(t.created_at) as newest
from onetime.adoptions as a
join (
  select 'auth.one_time_tokens' as table_name, created_at at time zone 'utc' as created_at
  from auth.one_time_tokens
  where token_hash !~ '^ot[lch]1\.[a-z0-9]{1,16}\.'
  union all
  select 'public.email_verification_tokens', created_at
  from public.email_verification_tokens
  where email_verification_token !~ '^ev1\.[a-z0-9]{1,16}\.'
) as t on t.table_name = a.table_name and t.created_at > a.adopted_at
group by a.table_name
order by a.table_name

-- name: keys_in_use
-- The ids of the keys that rows of ours name, with how many live rows name each and when the last of them expires.
-- Receipts too: without its key, a retry passes for another request, and is told REQUEST_ID_REUSED.
select key_id, count(*) as rows, max(expires_at) as last_expiry
from (
  select
    substring(t.token_hash from '^ot[lch]1\.([a-z0-9]{1,16})\.') as key_id,
    (t.created_at + coalesce(s.ttl, make_interval(secs => %(longest_ttl)s))) at time zone 'utc' as expires_at
  from auth.one_time_tokens as t
  left join onetime.one_time_token_states as s
    on s.user_id = t.user_id and s.token_type = t.token_type and s.token_id = t.id
  union all
  select substring(email_verification_token from '^ev1\.([a-z0-9]{1,16})\.'), expires_at
  from public.email_verification_tokens
  where used_at is null and deleted_at is null
  union all
  select split_part(fingerprint, '.', 1), created_at + make_interval(secs => %(receipt_retention)s)
  from onetime.receipts
) as named
where key_id is not null and expires_at > clock_timestamp()
group by key_id
order by key_id

-- name: operation
-- What the server's operator decides: room for connections, replication, clean-up, and the clock. Who takes a base
-- backup, or changes by logical decoding, is no standby that a failover could go to.
select
  current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int as connections,
  current_setting('autovacuum') = 'on' as autovacuum,
  current_setting('synchronous_standby_names') <> '' as waits_for_standby,
  (
    select count(*)
    from pg_stat_replication as r
    left join pg_replication_slots as s on s.active_pid = r.pid
    where s.slot_type is distinct from 'logical' and r.application_name is distinct from 'pg_basebackup'
  ) as standbys,
  pg_backend_pid() as backend_pid,
  clock_timestamp() as now

-- name: stopped_subjects
-- How many users and purposes have had so many wrong codes in a row that their codes are stopped, or were a while ago.
select count(*) as subjects from onetime.budgets where failures_in_a_row >= %(failures_in_a_row)s

-- name: unindexed_users
-- How many rows PurgeUser, and any deletion of a user by the host, reads one by one, for want of an index.
select greatest(c.reltuples, 0)::bigint as rows
from pg_class as c
where c.oid = 'public.email_verification_tokens'::regclass
  and not exists (
    select
    from pg_index as i
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = c.oid and a.attname = 'user_id' and i.indisvalid and i.indpred is null
  )
