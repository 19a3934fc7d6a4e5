-- Mails with codes, one row for each verification whose code the service mails: the newest mail with it. There is no code
-- here: it is unsealed from the verification when a mail is made.
create table onetime.outbox (
  verification_id uuid not null primary key,  -- public.email_verification_tokens.id
  message_id uuid not null,          -- of which Message-ID is made; a new one when the code is sent again
  sealed_address bytea,              -- null as soon as no mail can follow
  locale text not null,
  state text not null default 'queued' check (state in ('queued', 'sent', 'failed')),
  failure text check (failure in (
    'address_refused', 'message_refused', 'service_refused', 'deferred', 'unreachable', 'verification_over'
  )),                                -- why it failed or, while it is queued, why its last try did
  tries smallint not null default 0, -- counted before they are made
  queued_at timestamp with time zone not null default clock_timestamp(),
  due_at timestamp with time zone default clock_timestamp() -- to be sent; or, at the verification's end, to be wiped
);
create index outbox_due_at on onetime.outbox (due_at) where due_at is not null;
create index outbox_queued_at on onetime.outbox (queued_at) where state = 'queued';
