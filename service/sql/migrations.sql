-- What `migrate` asks and writes. Definitions come out the same on every server and for every role, because the
-- transaction has one search_path: pg_catalog alone.

-- name: configure_transaction
-- Time limits, and the settings that the text of a definition depends on, until the end of the transaction.
select
  set_config('lock_timeout', %(lock_timeout)s, true),
  set_config('statement_timeout', %(statement_timeout)s, true),
  set_config('timezone', 'UTC', true),
  set_config('search_path', 'pg_catalog', true),
  set_config('quote_all_identifiers', 'off', true)

-- name: set_lock_timeout
-- Waiting for another `migrate` is one thing, waiting for a lock on a host's table another.
select set_config('lock_timeout', %(lock_timeout)s, true)

-- name: take_lock
-- One `migrate` at a time in this database. Given back by the end of the transaction, whichever it is.
select pg_advisory_xact_lock(%(lock)s)

-- name: find_objects
-- Which of these names (schema.object, or a schema alone) are taken, and by what. Reads the catalog only, which needs
-- no privilege on the objects; a function is meant without arguments.
with wanted as (
  select
    name,
    split_part(name, '.', 1) as schema_name,
    split_part(name, '.', 2) as object_name
  from unnest(%(names)s::text[]) as name
)
select
  wanted.name,
  case
    when class.relispartition then 'partition'
    when class.relkind = 'r' and class.relpersistence = 'u' then 'unlogged table'
    when class.relkind = 'r' and exists (
      select from pg_inherits where class.oid in (pg_inherits.inhrelid, pg_inherits.inhparent)
    ) then 'table with inheritance'
    when class.relkind = 'r' then 'table'
    when class.relkind = 'p' then 'partitioned table'
    when class.relkind = 'v' then 'view'
    when class.relkind = 'm' then 'materialized view'
    when class.relkind = 'f' then 'foreign table'
    when class.relkind = 'S' then 'sequence'
    when class.relkind = 'c' then 'composite type'
    else 'index'
  end as kind,
  class.oid::text as oid
from wanted
join pg_namespace as namespace on namespace.nspname = wanted.schema_name
join pg_class as class on class.relnamespace = namespace.oid and class.relname = wanted.object_name
union all
select
  wanted.name,
  case type.typtype when 'e' then 'enum' when 'd' then 'domain' else 'type' end,
  type.oid::text
from wanted
join pg_namespace as namespace on namespace.nspname = wanted.schema_name
join pg_type as type on type.typnamespace = namespace.oid and type.typname = wanted.object_name
where type.typrelid = 0
union all
select
  wanted.name,
  case when proc.prorettype = 'trigger'::regtype then 'trigger function' else 'function for other uses' end,
  proc.oid::text
from wanted
join pg_namespace as namespace on namespace.nspname = wanted.schema_name
join pg_proc as proc on proc.pronamespace = namespace.oid and proc.proname = wanted.object_name
where proc.pronargs = 0
union all
select
  wanted.name,
  'schema',
  namespace.oid::text
from wanted
join pg_namespace as namespace on namespace.nspname = wanted.name

-- name: has_user_key
-- Whether a foreign key can reference the `id` of this table, and it is a uuid.
select exists (
  select
  from pg_attribute as attribute
  join pg_index as index on index.indrelid = attribute.attrelid
  where attribute.attrelid = %(table)s::regclass
    and attribute.attname = 'id'
    and attribute.atttypid = 'uuid'::regtype
    and index.indisunique
    and index.indisvalid
    and index.indimmediate
    and index.indpred is null
    and index.indnkeyatts = 1
    and index.indkey[0] = attribute.attnum
) as has_user_key

-- name: enum_labels
-- The labels of an enum in their order.
select coalesce(string_agg(enumlabel, ', ' order by enumsortorder), '') as labels
from pg_enum
where enumtypid = %(type)s::regtype

-- name: table_facts
-- All that can be told of a table, one row for each fact. Names in the table's own schema are written bare, as the
-- documents of the seed have it, so that a table reads the same in whichever schema it stands. NOT NULL is taken from
-- the column: it is a constraint with a name from PostgreSQL 18 on only. `required`: a row cannot be written without it.
with subject as (
  select
    class.oid,
    class.relrowsecurity,
    class.relforcerowsecurity,
    '\m(pg_temp|' || namespace.nspname || ')\.' as own_schema
  from pg_class as class
  join pg_namespace as namespace on namespace.oid = class.relnamespace
  where class.oid = %(table)s::regclass
),

columns as (
  select
    attribute.attname,
    attribute.attgenerated,
    attribute.attidentity,
    attribute.attnotnull,
    attribute.atthasdef,
    format_type(attribute.atttypid, attribute.atttypmod) as type_name,
    case when attribute.attcollation <> type.typcollation then attribute.attcollation::regcollation::text end
      as collation_name,
    type.typnotnull and type.typdefault is null as domain_requires_value,
    pg_get_expr(attrdef.adbin, attrdef.adrelid) as expression,
    col_description(attribute.attrelid, attribute.attnum) as comment
  from subject
  join pg_attribute as attribute on attribute.attrelid = subject.oid
  join pg_type as type on type.oid = attribute.atttypid
  left join pg_attrdef as attrdef on attrdef.adrelid = attribute.attrelid and attrdef.adnum = attribute.attnum
  where attribute.attnum > 0 and not attribute.attisdropped
),

facts (kind, name, definition, required) as (
  select
    'column',
    attname,
    concat(
      type_name,
      ' collate ' || collation_name,
      case when attgenerated <> '' then ' generated' end,
      case when attidentity <> '' then ' identity' end,
      case when attnotnull then ' not null' end
    ),
    not atthasdef and attidentity = '' and (attnotnull or domain_requires_value)
  from columns
  union all
  select 'default of', attname, expression, false
  from columns
  where expression is not null and attgenerated = ''
  union all
  select 'comment on', attname, comment, false
  from columns
  where comment is not null
  union all
  select 'comment on', 'the table', obj_description(oid, 'pg_class'), false
  from subject
  where obj_description(oid, 'pg_class') is not null
  union all
  -- Unique and exclusion constraints are told as their indexes.
  select
    case con.contype when 'c' then 'check' when 'p' then 'primary key' else 'foreign key' end,
    con.conname,
    -- A restore with --disable-triggers that was broken off leaves a foreign key that is not enforced.
    pg_get_constraintdef(con.oid) || case
      when exists (
        select from pg_trigger where pg_trigger.tgconstraint = con.oid and pg_trigger.tgenabled in ('D', 'R')
      ) then ' (disabled)' else ''
    end,
    false
  from subject
  join pg_constraint as con on con.conrelid = subject.oid
  where con.contype in ('c', 'p', 'f')
  union all
  select
    'index',
    class.relname,
    concat(
      pg_get_indexdef(index.indexrelid),
      case when not index.indisvalid then ' (invalid)' end,
      case when not index.indimmediate then ' (deferrable)' end
    ),
    false
  from subject
  join pg_index as index on index.indrelid = subject.oid
  join pg_class as class on class.oid = index.indexrelid
  union all
  select
    'trigger',
    trigger.tgname,
    pg_get_triggerdef(trigger.oid) || case trigger.tgenabled
      when 'O' then '' when 'D' then ' (disabled)' when 'R' then ' (on replicas)' else ' (always)'
    end,
    false
  from subject
  join pg_trigger as trigger on trigger.tgrelid = subject.oid
  where not trigger.tgisinternal
  union all
  select 'rule', rewrite.rulename, pg_get_ruledef(rewrite.oid), false
  from subject
  join pg_rewrite as rewrite on rewrite.ev_class = subject.oid
  union all
  select
    'row level security',
    '',
    concat(
      case when relforcerowsecurity then 'forced' else 'enabled' end,
      case when row_security_active(oid) then ', and it binds the role ' || current_user end
    ),
    false
  from subject
  where relrowsecurity
  union all
  select 'policy', policy.polname, 'for row level security', false
  from subject
  join pg_policy as policy on policy.polrelid = subject.oid
)

select
  facts.kind,
  facts.name::text as name,
  regexp_replace(facts.definition, subject.own_schema, '', 'g') as definition,
  facts.required
from facts
cross join subject
order by facts.kind, facts.name

-- name: create_schema_migrations
-- Which migrations of our own schema were applied.
create table if not exists onetime.schema_migrations (
  version integer not null primary key,
  name text not null,
  applied_at timestamp with time zone not null default clock_timestamp()
)

-- name: create_adoptions
-- Since when the service uses a table that it shares with its host, and whether it made it.
create table if not exists onetime.adoptions (
  table_name text not null primary key,
  created boolean not null,
  adopted_at timestamp with time zone not null default clock_timestamp()
)

-- name: applied_migrations
-- The versions of our schema that this database has been brought to.
select version, name
from onetime.schema_migrations
order by version

-- name: record_migration
-- Written in the transaction of the migration itself.
insert into onetime.schema_migrations (version, name)
values (%(version)s, %(name)s)

-- name: adopted_tables
-- The tables that the service has taken into use.
select table_name, created, adopted_at
from onetime.adoptions

-- name: record_adoption
-- The first adoption of a table that was there counts. One that had to be made, or made again, is ours from now on.
insert into onetime.adoptions (table_name, created)
values (%(table)s, %(created)s)
on conflict (table_name) do update
  set created = excluded.created, adopted_at = excluded.adopted_at
  where excluded.created

-- name: users_table_is_ours
-- Whether `migrate` made public.users, and it has still nothing but its `id`: with another column it is the host's by
-- now, whoever made it.
select exists (
  select
  from onetime.adoptions
  where table_name = 'public.users' and created
)
and not exists (
  select
  from pg_catalog.pg_namespace as namespace
  join pg_catalog.pg_class as class on class.relnamespace = namespace.oid
  join pg_catalog.pg_attribute as attribute on attribute.attrelid = class.oid
  where namespace.nspname = 'public'
    and class.relname = 'users'
    and attribute.attnum > 0
    and not attribute.attisdropped
    and attribute.attname <> 'id'
) as ours
