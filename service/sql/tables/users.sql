-- public.users belongs to the host application. This is the least that a reference to it needs, made only where there
-- is no host yet.
create table public.users (
  id uuid primary key
);
