-- public.email_verification_tokens, to the letter as its owner documented it. public.users and
-- public.trigger_set_timestamp() must be there before.
create table public.email_verification_tokens (
  id uuid not null default gen_random_uuid(),
  user_id uuid not null,
  email_verification_token varchar(255) not null,
  code varchar(6) not null,
  code_sent boolean not null default false,
  created_at timestamp with time zone not null default now(),
  updated_at timestamp with time zone not null default now(),
  expires_at timestamp with time zone not null default (now() + '00:15:00'::interval),
  used_at timestamp with time zone,
  deleted_at timestamp with time zone,
  constraint email_verification_tokens_pkey primary key (id),
  constraint email_verification_tokens_user_id_fkey foreign key (user_id) references public.users (id),
  constraint email_verification_token_length check (length(email_verification_token) >= 128)
);

create index idx_email_verification_tokens_expires_at on public.email_verification_tokens using btree (expires_at);
create unique index unique_active_email_verification_token
  on public.email_verification_tokens using btree (email_verification_token, deleted_at)
  nulls not distinct
  where used_at is null;

create trigger set_timestamp before update on public.email_verification_tokens
  for each row execute function public.trigger_set_timestamp();

comment on table public.email_verification_tokens is
  'Stores email verification tokens and codes for two-step authentication. Expired records are automatically filtered in queries and randomly cleaned up (1 in 10 chance) to prevent table bloat.';
comment on column public.email_verification_tokens.id is
  'A unique identifier for this token record';
comment on column public.email_verification_tokens.user_id is
  'References the user this token belongs to';
comment on column public.email_verification_tokens.email_verification_token is
  'Long random string token (minimum 128 characters) returned to frontend for verification';
comment on column public.email_verification_tokens.code is
  'One-time 6-digit verification code sent via email';
comment on column public.email_verification_tokens.code_sent is
  'Whether the email with code has been sent';
comment on column public.email_verification_tokens.created_at is
  'Time when the token was created.';
comment on column public.email_verification_tokens.updated_at is
  'Time when the record was last updated. Automatically set by trigger.';
comment on column public.email_verification_tokens.expires_at is
  'Time after which the token and code become invalid (default 15 minutes)';
comment on column public.email_verification_tokens.used_at is
  'Time when the token was successfully used. Null if unused.';
comment on column public.email_verification_tokens.deleted_at is
  'Timestamp when the record was deleted. If null, the record is not deleted.';
