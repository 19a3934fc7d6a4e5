-- What is asked of a database before it is served from.

-- name: trust
-- What would let the database lose a token that it has acknowledged, or accept one twice.
select fault
from (values
  (current_setting('server_version_num')::int < 150000,
    'PostgreSQL is older than 15: upgrade it'),
  (current_setting('fsync') = 'off',
    'fsync is off: set it on in postgresql.conf'),
  (current_setting('full_page_writes') = 'off',
    'full_page_writes is off: set it on in postgresql.conf'),
  (pg_is_in_recovery() or current_setting('transaction_read_only') = 'on',
    'it takes no writes: give the URL of the primary'),
  (to_regclass('auth.one_time_tokens') is not null and row_security_active(to_regclass('auth.one_time_tokens')::oid),
    'row level security hides rows of auth.one_time_tokens from this role: use its owner, or a role with BYPASSRLS'),
  (to_regclass('public.email_verification_tokens') is not null
      and row_security_active(to_regclass('public.email_verification_tokens')::oid),
    'row level security hides rows of public.email_verification_tokens from this role: use its owner, or a role with'
    ' BYPASSRLS')
) as check_list (failed, fault)
where failed
