-- What is asked of a database before it is served from.

-- name: trust
-- What would let the database lose a token that it has acknowledged, or accept one twice, or keep this role from its
-- work. From the catalog, since to_regclass fails where the role may not use a schema.
with used as (
  select c.oid, n.oid as schema, w.wanted, quote_ident(n.nspname) || '.' || quote_ident(c.relname) as name
  from (values
    ('auth', 'one_time_tokens', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('public', 'email_verification_tokens', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('public', 'users', array['SELECT']),
    ('onetime', 'one_time_token_states', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('onetime', 'email_verification_states', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('onetime', 'budgets', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('onetime', 'outbox', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('onetime', 'receipts', array['SELECT', 'INSERT', 'UPDATE', 'DELETE']),
    ('onetime', 'sweep_cursors', array['SELECT', 'INSERT', 'UPDATE']),
    ('onetime', 'schema_migrations', array['SELECT']),
    ('onetime', 'adoptions', array['SELECT'])
  ) as w (schema_name, table_name, wanted)
  join pg_namespace as n on n.nspname = w.schema_name
  join pg_class as c on c.relnamespace = n.oid and c.relname = w.table_name
)
select fault
from (values
  (current_setting('server_version_num')::int < 150000,
    'PostgreSQL is older than 15: upgrade it'),
  (current_setting('fsync') = 'off',
    'fsync is off: set it on in postgresql.conf'),
  (current_setting('full_page_writes') = 'off',
    'full_page_writes is off: set it on in postgresql.conf'),
  (pg_is_in_recovery() or current_setting('transaction_read_only') = 'on',
    'it takes no writes: give the URL of the primary')
) as checked (failed, fault)
where failed
union all
select distinct 'the role ' || current_user || ' may not use the schema ' || split_part(name, '.', 1)
  || ': grant usage on schema ' || split_part(name, '.', 1) || ' to ' || quote_ident(current_user)
from used
where not has_schema_privilege(schema, 'USAGE')
union all
select 'the role ' || current_user || ' lacks privileges on ' || name
  || ': grant ' || lower(string_agg(wants, ', ')) || ' on ' || name || ' to ' || quote_ident(current_user)
from used
cross join unnest(wanted) as wants
where not has_table_privilege(oid, wants)
group by name
union all
select 'row level security hides rows of ' || name || ' from the role ' || current_user
  || ': use the owner of the table, or a role with BYPASSRLS'
from used
where row_security_active(oid)
