-- What the two tables have no room for. Nothing here has a foreign key onto them: their rows may go at any time, by
-- the host's hand too, and what is left of them here is swept away.

-- One row for each live one-time token: the lifetime asked for and the codes compared. A token that replaces another
-- takes over its row, as it does in auth.one_time_tokens; token_id tells whose row it is now.
create table onetime.one_time_token_states (
  user_id uuid not null,
  token_type auth.one_time_token_type not null,
  token_id uuid not null,            -- auth.one_time_tokens.id
  ttl interval not null,             -- expires at auth.one_time_tokens.created_at + ttl; hours and less, never days
  failed_attempts smallint not null default 0,
  caller text not null,              -- who issued it
  created_at timestamp with time zone not null default clock_timestamp(),
  primary key (user_id, token_type)
);

-- One row for each email verification. It is found by the digest of the token that the frontend holds: the table's own
-- index on that column covers unused rows only.
create table onetime.email_verification_states (
  token_hash text collate "C" not null primary key, -- equal to public.email_verification_tokens.email_verification_token
  id uuid not null,                  -- public.email_verification_tokens.id
  failed_attempts smallint not null default 0,
  caller text not null,              -- who started it
  delivery text not null check (delivery in ('return_code', 'send_email')),
  created_at timestamp with time zone not null default clock_timestamp()
);

-- Answers kept for retries, written in the transaction of their effect.
create table onetime.receipts (
  caller text not null,
  rpc text not null,
  request_id uuid not null,
  fingerprint text not null,         -- keyed HMAC of the request
  row_id uuid,                       -- the token or verification that the call made, charged or changed
  answer bytea,                      -- sealed; null for a call whose answer is made anew, or whose charge is pending
  retries integer not null default 0,
  created_at timestamp with time zone not null default clock_timestamp(),
  primary key (request_id, rpc, caller)
);

-- Where the next clean-up of a table goes on: the tables are swept by blocks, since not all have an index on time.
create table onetime.sweep_cursors (
  table_name text not null primary key,
  next_block bigint not null default 0
);
