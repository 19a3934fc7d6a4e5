-- What `onetime doctor` asks. It only reads.

-- name: configure_session
-- A limit on what reading the whole of both tables may take, and times in UTC.
select set_config('statement_timeout', %(statement_timeout)s, false), set_config('timezone', 'UTC', false)

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
-- The ids of the keys that rows of ours name, with how many rows name each.
select key_id, count(*) as rows
from (
  select substring(token_hash from '^ot[lch]1\.([a-z0-9]{1,16})\.') as key_id
  from auth.one_time_tokens
  union all
  select substring(email_verification_token from '^ev1\.([a-z0-9]{1,16})\.')
  from public.email_verification_tokens
  where used_at is null and deleted_at is null
) as named
where key_id is not null
group by key_id
order by key_id
