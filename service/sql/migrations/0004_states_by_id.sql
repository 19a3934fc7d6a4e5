-- States by their verification's id: new ids stand together in an index, while digests lie anywhere in it, and are long.
-- The digest has a hash index in its place, of a tenth of the size: an insert into a large table touches a page that
-- others have touched already, and is in memory.
alter table onetime.email_verification_states
  drop constraint email_verification_states_pkey,
  add primary key (id);
create index email_verification_states_token_hash on onetime.email_verification_states using hash (token_hash);
