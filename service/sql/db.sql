-- What every connection sets, and what belongs to no table.

-- name: configure_session
-- UTC, so that no session setting changes what a timestamp means; time limits; a commit that is on disk before it is
-- acknowledged; and, where the role may, neither parameters nor rows in the server's log: they hold addresses and digests.
select
  set_config('timezone', 'UTC', false),
  set_config('statement_timeout', %(statement_timeout)s, false),
  set_config('lock_timeout', %(lock_timeout)s, false),
  set_config('idle_in_transaction_session_timeout', %(idle_timeout)s, false),
  set_config('default_transaction_isolation', 'read committed', false),
  -- Every statement looks rows up by an index, whatever the size of its tables. Left to itself, the planner reads whole
  -- tables where they were small when it last looked. So where a condition fits a partial index, or not the first column
  -- of one, statements hide it from the planner: in a case, or behind a cast.
  -- The other way to read a whole table is to begin a join with it, which is cheapest where it was empty when it was last
  -- analysed. So what is looked up is bound to the parameters by an array too, or stands in a lateral query of its own,
  -- which `offset 0` keeps apart, or is compared with an array of one; and an order that a unique index has is asked for
  -- as a row.
  set_config('enable_seqscan', 'off', false),
  set_config('enable_hashjoin', 'off', false),
  set_config('enable_mergejoin', 'off', false),
  set_config('plan_cache_mode', 'force_generic_plan', false),
  set_config('jit', 'off', false),
  case when current_setting('synchronous_commit') in ('off', 'local') then
    set_config('synchronous_commit', 'on', false)
  end,
  case when has_parameter_privilege(current_user, 'log_parameter_max_length', 'SET') then
    set_config('log_parameter_max_length', '0', false)
  end,
  case when has_parameter_privilege(current_user, 'log_parameter_max_length_on_error', 'SET') then
    set_config('log_parameter_max_length_on_error', '0', false)
  end,
  case when has_parameter_privilege(current_user, 'log_error_verbosity', 'SET') then
    set_config('log_error_verbosity', 'terse', false)
  end

-- name: charge_nobody
-- What counting a wrong guess costs where there is nothing to count on: a record in the write-ahead log, to be flushed
-- at COMMIT. Without it, the time that an answer takes would tell what exists.
select pg_logical_emit_message(true, 'onetime', '') is not null as done

-- name: ping
-- Ask whether the database answers and takes writes.
select not pg_is_in_recovery() and current_setting('transaction_read_only') = 'off' as writable

-- name: be_impatient
-- Do not wait long for a lock, in this transaction.
select set_config('lock_timeout', %(lock_timeout)s, true)
