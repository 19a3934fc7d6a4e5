-- What the trigger set_timestamp runs. The documents name it and leave its body to the host, whose own is used if there
-- is one; this is the usual one.
create function public.trigger_set_timestamp() returns trigger
language plpgsql
as $$
begin
  new.updated_at = now();
  return new;
end
$$;
