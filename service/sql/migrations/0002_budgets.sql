-- What bounds guesses and sends.

-- One row for each user and purpose. It outlives tokens, so that neither a new token nor a clean-up gives anybody fresh
-- guesses. The times are the newest ones, oldest first, no more of them than the limits look at.
create table onetime.budgets (
  user_id uuid not null,
  purpose text not null,             -- a label of auth.one_time_token_type, or email_verification
  failures timestamp with time zone[] not null default '{}',  -- wrong codes, and codes that are being compared
  failures_in_a_row integer not null default 0,               -- since the last right code
  sends timestamp with time zone[] not null default '{}',     -- what was issued, started and sent again
  primary key (user_id, purpose)
);

-- The default is for servers of an older version that still run while this one is rolled out.
alter table onetime.email_verification_states
  add column last_sent_at timestamp with time zone not null default clock_timestamp();
