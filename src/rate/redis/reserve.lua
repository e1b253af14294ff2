-- Serves one request of one member of a quota: reserves, settles estimates, pauses, changes the limits. The server runs
-- the script in one step, so members cannot overtake each other in the middle of it.
--
-- virtual_schedule.rs does the same in Rust, in the same steps, and a test compares the two. If you change one of the
-- two files, change the other.
--
-- This file is a template. Before it is loaded, script.rs replaces
--   state.NAME   by state[I]           a number of the stored state; the list of them is in script.rs
--   bucket.NAME  by state[bucket + I]  a number of a bucket, where `bucket` is the position of the bucket's first one
--   reply.NAME   by reply[I]           a number of the reply; the list of them is in wire.rs
-- and some words in capitals, such as the length of the state, by what follows from these lists.
--
-- Lua counts in doubles, which hold integers up to 2^53 exactly. All numbers here are such integers: buckets are
-- counted in units (fractions of a request or token), times in microseconds. So
--   - do not concatenate a number to a string: Lua keeps only 14 digits of it;
--   - do not call TIME twice: the server's clock advances while the script runs;
--   - do not raise errors: their texts differ between server versions. Problems are part of the reply.
--
-- KEYS[1]  the stored state
-- KEYS[2]  where the first release with shared limits kept its state
-- ARGV[1]  the numbers of the request (wire.rs): a fixed list, then eight for each rate, then for each budget of the
--          member what to refund, then for each what to charge, and so on, then for each cost one number per budget
-- ARGV[2]  the name of the member, 16 bytes
-- ARGV[3]  the publish/subscribe channel on which pauses are announced to the members
-- ARGV[4]  the names of the member's budgets, separated by spaces
-- ARGV[5]  two lines: the member's limits, and the limits that it was started with. Left out if the member expects that
--          the stored state has the same version of the limits; an empty reply asks for a request with the limits.
--
-- The stored state is a string: the numbers of `state`, the sum of the unsettled estimates of each budget, the numbers
-- of each bucket, an entry for each member (its name, the numbers of `entry`, its unsettled estimates of each budget), the
-- name of the member that holds the claim, the names of the budgets, and the two lines of ARGV[5] from the member that
-- set the limits. A bucket names its budget by its position in the list of names. The state begins with the
-- version of this layout, also in all later releases; the reply begins with it, too.
local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min
local read, write, rep, sub, values = struct.unpack, struct.pack, string.rep, string.sub, unpack
-- In units: estimates are counted up to this number, so that no sum exceeds what doubles hold exactly.
local MAX_ESTIMATED = 2 ^ 52
-- All in microseconds: see their descriptions in virtual_schedule.rs.
local MEMBER_EXPIRY, SWEEP_INTERVAL, RETURN_TIME = 15000000, 1000000, 1500000
local DEMAND_EXPIRY, CLAIM_EXPIRY, MAX_SERVED = 500000, 2500000, 60000000
-- In milliseconds: how much longer the key has to live than until the buckets are full and the pause has ended.
local MIN_RETENTION = 60000
-- In microseconds: the key's time to live is set again only if it is too short by more than this. So the key may expire
-- this much earlier, which store_view.rs knows.
local EXPIRY_SLACK = 30000000
-- In bytes: the length of the name that the entry of a member begins with.
local NAME = 16
-- In bytes: the length of a rate in the request, which is eight numbers.
local RATE = 64

local REQUEST_NAMES, rates_at = read(REQUEST_FORMAT, ARGV[1])

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local state, entries, claimant, names, text
-- Whether members that wait have to send their requests again at once, because something has changed.
local is_announced = false
-- The positions of the first and of the last bucket in the state; the length of a member's entry in bytes; the formats
-- of the numbers in the state and in an entry.
local first_bucket, last_bucket, entry_length, state_format, entry_format

-- Creating a function costs more than calling it, so only the two functions that every request needs are created here.

-- Fills the buckets up to the time `target`. What overflows while estimates are unsettled is withheld from later
-- refunds: if the true cost had been charged instead of the estimate, the bucket would have been fuller, and the refund
-- would have overflowed too.
local function advance_to(target)
  local elapsed = target - state.scheduled_until
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local balance, capacity = bucket.balance, bucket.capacity
    if elapsed * bucket.fill < capacity - balance then
      balance = balance + elapsed * bucket.fill
    else
      balance = capacity
    end
    bucket.balance = balance
    local estimated = state[ESTIMATED + bucket.budget]
    if estimated > 0 then
      local spilled = min(estimated * bucket.unit, MAX_ESTIMATED) - (capacity - balance)
      if spilled > bucket.withheld then bucket.withheld = spilled end
    end
  end
  state.scheduled_until = target
end

-- Adapts what is withheld from refunds, after the sums of the unsettled estimates or the balances have changed.
local function adapt_withheld()
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local estimated = min(state[ESTIMATED + bucket.budget] * bucket.unit, MAX_ESTIMATED)
    if bucket.withheld > estimated then bucket.withheld = estimated end
    local spilled = estimated - (bucket.capacity - bucket.balance)
    if estimated > 0 and spilled > bucket.withheld then bucket.withheld = spilled end
  end
end

-- 1. Read the stored state.

local stored = redis.call('GET', KEYS[1])
if stored then
  -- Releases with other layouts cannot share a quota. If they kept their states apart, each would admit the whole rate.
  if #stored < 24 then return {0} end
  local stored_version, its_rates, its_budgets = read('<ddd', stored)
  if stored_version ~= VERSION then return {stored_version} end
  local length = ESTIMATED + its_budgets + BUCKET_LENGTH * its_rates
  first_bucket, last_bucket = ESTIMATED + its_budgets + 1, length - BUCKET_LENGTH + 1
  entry_length, entry_format = NAME + 8 * (ENTRY_NUMBERS + its_budgets), sub('<dddddddddddd', 1, 1 + ENTRY_NUMBERS + its_budgets)
  state_format = '<' .. rep('d', length)
  state = {read(state_format, stored)}
  -- The last value that was read is no number of the state: it is the position where reading stopped.
  local from = state[length + 1]
  local to = from + entry_length * state.members
  entries, claimant = sub(stored, from, to - 1), sub(stored, to, to + NAME - 1)
  to = to + NAME
  names, text = sub(stored, to, to + state.names_length - 1), sub(stored, to + state.names_length)
  state[length + 1] = nil
end
if incarnation == 0 and redis.call('GET', KEYS[2]) then return {FIRST_VERSION} end

-- 2. Compare the stored state with what the member has seen: state may be lost, limits may differ, the clock may have
-- gone back.

-- Whether the stored state lacks something that this member was promised by a reply, such as a reservation.
local is_stale = false
if stored and now >= state.clock and config_version == state.config_version and is_change == 0 and
  (incarnation == 0 or incarnation == state.incarnation and state.sequence >= sequence) then
  -- This is the usual case: the stored state is the one that the member has seen.
  state.clock = now
else
  if not ARGV[5] and (not stored or config_version > state.config_version) then
    -- The member's limits are needed: the empty reply asks the member to send the request again, with its limits.
    -- Nothing has been written yet.
    return {}
  end

  -- Reserves nothing for `span` microseconds, in which members may use reservations of a lost state. Also empties the
  -- buckets if `is_emptied`.
  local function hold(span, is_emptied)
    if now > state.scheduled_until then advance_to(now) end
    if is_emptied then
      for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
        bucket.balance = min(bucket.balance, 0)
      end
      state.emptied_at = now
    end
    state.scheduled_until = max(state.scheduled_until, now + span)
  end

  local function quotient(a, b)
    local q = floor(a / b)
    if q * b > a then q = q - 1 end
    return q
  end

  local function names_in(list)
    local all = {}
    for name in string.gmatch(list, '[^ ]+') do
      table.insert(all, name)
    end
    return all
  end

  -- Replaces the buckets by new ones for the member's limits, without estimates.
  local function create_buckets()
    local specs = {read('<' .. rep('d', BUCKET_LENGTH * rates), ARGV[1], rates_at)}
    for i = #state, ESTIMATED + 1, -1 do
      state[i] = nil
    end
    state.rates, state.budgets, names, text = rates, budgets, ARGV[4], ARGV[5]
    first_bucket = ESTIMATED + budgets + 1
    last_bucket = first_bucket + BUCKET_LENGTH * (rates - 1)
    state_format = '<' .. rep('d', last_bucket + BUCKET_LENGTH - 1)
    entry_length, entry_format = NAME + 8 * (ENTRY_NUMBERS + budgets), sub('<dddddddddddd', 1, 1 + ENTRY_NUMBERS + budgets)
    for i = 1, budgets do
      state[ESTIMATED + i] = 0
    end
    for i = 1, BUCKET_LENGTH * rates do
      state[first_bucket - 1 + i] = specs[i]
    end
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      -- In the request, this position has the number that step 3 reads: what the provider reports as remaining.
      bucket.withheld = 0
    end
  end

  -- Takes over the member's limits; what is in the buckets stays there. Returns whether a bucket is new, so that it has
  -- no contents to take over.
  local function configure()
    -- Returns the whole part of a * b / c, for a < c.
    local function scaled(a, b, c)
      if a * b < 2 ^ 53 then return quotient(a * b, c) end
      -- The product a * b would not be exact in a double, so this is a long multiplication and division, bit by bit.
      local q, r, bit = 0, 0, 2 ^ 51
      while bit >= 1 do
        q, r = q * 2, r * 2
        if floor(b / bit) % 2 == 1 then r = r + a end
        while r >= c do
          q, r = q + 1, r - c
        end
        bit = bit / 2
      end
      return q
    end
    local old, successor_of = {}, {}
    local old_names, estimated_of, old_length, old_format = names_in(names), {}, entry_length, entry_format
    for i, name in ipairs(old_names) do
      estimated_of[name] = state[ESTIMATED + i]
    end
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      local without = bucket.balance - bucket.withheld
      table.insert(old, {
        budget = old_names[bucket.budget], period = bucket.period, unit = bucket.unit, balance = bucket.balance, without = without
      })
    end
    create_buckets()
    local new_names = names_in(names)
    for i, name in ipairs(new_names) do
      state[ESTIMATED + i] = estimated_of[name] or 0
    end
    -- The entries of the members have their estimates in the order of the new names.
    local moved = {}
    for at = 1, #entries, old_length do
      local numbers = {read(old_format, entries, at + NAME)}
      for i, name in ipairs(old_names) do
        estimated_of[name] = numbers[ENTRY_NUMBERS + i]
      end
      local entry = {values(numbers, 1, ENTRY_NUMBERS)}
      for _, name in ipairs(new_names) do
        table.insert(entry, estimated_of[name] or 0)
      end
      table.insert(moved, sub(entries, at, at + NAME - 1) .. write(entry_format, values(entry)))
    end
    entries = table.concat(moved)
    -- A rate takes over the bucket of the old rate with the same budget and period, or else that of the first old rate
    -- of its budget that is left over.
    for _, same_period in ipairs({true, false}) do
      for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
        for _, before in ipairs(old) do
          if not successor_of[bucket] and not before.is_taken and before.budget == new_names[bucket.budget] and
            (not same_period or before.period == bucket.period) then
            before.is_taken, successor_of[bucket] = true, before
          end
        end
      end
    end
    local is_any_new = false
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      local unit = bucket.unit
      local before = successor_of[bucket]
      if before then
        local function convert(units)
          local whole = quotient(units, before.unit)
          return whole * unit + scaled(units - whole * before.unit, unit, before.unit)
        end
        local balance = convert(before.balance)
        local amount = state[ESTIMATED + bucket.budget]
        bucket.balance = max(min(balance, bucket.capacity), -bucket.max_debt)
        -- The withheld part is rounded together with the balance. If both were rounded by themselves, a refund could be
        -- a unit more than before.
        local cut_off = max(-bucket.max_debt - balance, 0)
        bucket.withheld = min(balance - convert(before.without) + cut_off, min(amount * unit, MAX_ESTIMATED))
      else
        is_any_new = true
      end
    end
    return is_any_new
  end

  local function forget_members()
    entries, state.members, state.wanting, state.claimed_until = '', 0, 0, 0
    for i = 1, state.budgets do
      state[ESTIMATED + i] = 0
    end
    adapt_withheld()
  end

  if not stored then
    state, entries, claimant = {STATE_ZEROS}, '', rep('\0', NAME)
    state.incarnation, state.clock, state.scheduled_until, state.swept_at = now, now, now, now
    state.version, state.config_version, state.began_full = VERSION, now, 1
    create_buckets()
    if config_version ~= 0 then state.config_version = config_version end
    if incarnation ~= 0 then
      -- The member has seen a state that is lost. What other members have taken from that state cannot be found out, so
      -- the buckets begin empty.
      state.incarnation, state.began_full = max(now, incarnation + 1), 0
      hold(max_ahead, true)
    end
  end

  -- If the server's clock went back, all stored times are moved back with it, so that no time has passed.
  local back = state.clock - now
  if back > 0 then
    state.scheduled_until = state.scheduled_until - back
    state.user_paused_until = max(state.user_paused_until - back, 0)
    state.provider_paused_until = max(state.provider_paused_until - back, 0)
    state.swept_at, state.emptied_at = state.swept_at - back, state.emptied_at - back
    state.claimed_until, state.claim_at = state.claimed_until - back, state.claim_at - back
    state.expires_at, state.last_contact = state.expires_at - back, state.last_contact - back
    local moved = {}
    for at = 1, #entries, entry_length do
      local entry = {read(entry_format, entries, at + NAME)}
      entry.seen_at, entry.served_until = entry.seen_at - back, entry.served_until - back
      entry.wants_until, entry[ENTRY_NUMBERS + 1 + state.budgets] = entry.wants_until - back, nil
      table.insert(moved, sub(entries, at, at + NAME - 1) .. write(entry_format, values(entry)))
    end
    entries = table.concat(moved)
  end
  state.clock = now

  if incarnation ~= 0 and incarnation ~= state.incarnation then
    is_stale = true
    -- A state that began with full buckets was not informed of the earlier one that this member has seen.
    if state.began_full == 1 then hold(max_ahead, true) else hold(min(last_reservation, max_ahead), false) end
    state.began_full = 0
  elseif incarnation ~= 0 and state.sequence < sequence then
    -- The server went back to an old snapshot, or to a replica that lagged behind, so that the stored state is older
    -- than the member's last reply.
    is_stale = true
    hold(max_ahead, true)
    state.incarnation, state.began_full, state.sequence = max(now, state.incarnation + 1), 0, sequence
    forget_members()
  end

  if config_version ~= state.config_version or is_change == 1 then
    local is_new = false
    if config_version == 0 then
      -- A member that has just started brings its limits, unless they are in force or were replaced since.
      local line_end, own_line_end = string.find(text, '\n', 1, true), string.find(ARGV[5], '\n', 1, true)
      is_new = sub(ARGV[5], own_line_end) ~= sub(text, line_end) and
        sub(ARGV[5], 1, own_line_end) ~= sub(text, 1, line_end)
    end
    if is_change == 1 or config_version > state.config_version or is_new then
      if is_change == 1 or config_version == 0 then
        state.config_version = max(now, state.config_version + 1)
      else
        state.config_version = config_version
      end
      local is_any_new = configure()
      is_announced = true
      adapt_withheld()
      -- Earlier estimates were never charged to a new bucket, so they must not be refunded to it.
      if is_any_new then forget_members() end
    end
  end
end

-- 3. Advance the time, change the pauses, and lower the buckets to what the provider reports as remaining.

if now > state.scheduled_until then advance_to(now) end
local user_paused_until, provider_paused_until = state.user_paused_until, state.provider_paused_until
if user_pause > 0 or user_pause == 0 and user_paused_until > now then
  user_paused_until = now + user_pause
end
-- The pause of the provider is only extended, unless it is ended.
if provider_pause > 0 and now + provider_pause > provider_paused_until or
  provider_pause == 0 and provider_paused_until > now then
  provider_paused_until = now + provider_pause
end
if user_paused_until ~= state.user_paused_until or provider_paused_until ~= state.provider_paused_until then
  state.user_paused_until, state.provider_paused_until = user_paused_until, provider_paused_until
  is_announced = true
end
-- The reported amounts belong to the rates of the member's limits, so they are used only if these limits are in force.
if lowered > 0 and string.match(text, '^[^\n]*') == string.match(ARGV[5], '^[^\n]*') then
  for i = 1, rates do
    local remaining = read('<d', ARGV[1], rates_at + RATE * i - 8)
    local bucket = first_bucket + BUCKET_LENGTH * (i - 1)
    if remaining >= 0 and remaining * bucket.unit < bucket.balance then bucket.balance = remaining * bucket.unit end
  end
  adapt_withheld()
end

-- 4. Remove the members that have sent no request for 15 s.

if now - state.swept_at >= SWEEP_INTERVAL then
  local kept = {}
  state.swept_at, state.wanting = now, 0
  for i = 1, state.budgets do
    state[ESTIMATED + i] = 0
  end
  for at = 1, #entries, entry_length do
    local entry = {read(entry_format, entries, at + NAME)}
    if now - entry.seen_at < MEMBER_EXPIRY then
      for i = 1, state.budgets do
        state[ESTIMATED + i] = state[ESTIMATED + i] + entry[ENTRY_NUMBERS + i]
      end
      if entry.wants_until > now then state.wanting = state.wanting + 1 end
      table.insert(kept, sub(entries, at, at + entry_length - 1))
    end
  end
  entries = table.concat(kept)
  state.members = #kept
  adapt_withheld()
end

-- 5. Read the amounts of the request, in the order of the budgets in the state.

local amounts = {read('<' .. rep('d', budgets * (AMOUNT_LISTS + costs)), ARGV[1], rates_at + RATE * rates)}
local is_missing = false
-- For each budget of the state the position of that budget in the request, or 0; nil if all positions are the same.
local places
if names ~= ARGV[4] then
  local position, mapped = {}, {}
  places = {}
  local i = 0
  for name in string.gmatch(ARGV[4], '[^ ]+') do
    i = i + 1
    position[name] = i
  end
  for name in string.gmatch(names, '[^ ]+') do
    -- The member does not know that this budget is limited. It learns that from the reply, and asks again.
    is_missing = is_missing or not position[name]
    table.insert(places, position[name] or 0)
  end
  for list = 0, AMOUNT_LISTS - 1 + costs do
    for _, place in ipairs(places) do
      table.insert(mapped, place > 0 and amounts[budgets * list + place] or 0)
    end
  end
  amounts = mapped
end
local count = state.budgets
-- Where the amounts of each kind begin: what follows is the number for the first budget, and so on.
local debits, usages, estimates, cost_at = count, 2 * count, 3 * count, AMOUNT_LISTS * count

-- 6. Settle the corrections (true cost minus estimate) that the member reports.

local entry_at = string.find(entries, ARGV[2], 1, true)
while entry_at and entry_at % entry_length ~= 1 do
  -- This match is not the start of an entry: the numbers in some entry look like the name.
  entry_at = string.find(entries, ARGV[2], entry_at + 1, true)
end
-- A batch of corrections is counted once: if its reply was lost, the member sends it again with the same number.
local is_known, is_counted = entry_at and not is_stale, is_probe == 1
local entry
if entry_at then
  entry = {read(entry_format, entries, entry_at + NAME)}
  local last_batch = entry.batch
  if is_counted then batch = last_batch end
  is_counted = is_counted or is_known and last_batch == batch
end
if not is_counted then
  local began = now - fallback_age
  if fallback_age > 0 and state.last_contact < began then
    -- No member has reached the store since this member lost it. So all members admitted calls by their local
    -- fallbacks, and have used what would be in the buckets now. They come back and report their usage within
    -- 1.5 s.
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      bucket.balance = min(bucket.balance, 0)
    end
    state.emptied_at, state.scheduled_until = now, max(state.scheduled_until, now + RETURN_TIME)
  end
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local budget = bucket.budget
    local all_estimated = state[ESTIMATED + budget]
    local credit, debit, usage = amounts[budget], amounts[debits + budget], amounts[usages + budget]
    local share = usage * bucket.unit
    if state.emptied_at > began then
      -- If the buckets were emptied after the member had begun to admit calls locally, this has paid for its usage
      -- until then. Since then it can have used no more than its share of the rate, so no more is charged.
      share = min(share, ceil((now - state.emptied_at) * bucket.fill / member_count))
    end
    local balance = bucket.balance
    for _, units in ipairs({share, debit * bucket.unit}) do
      balance = balance - units
      if balance < -bucket.max_debt then
        -- A deeper debt is forgotten. As far as it may be due to unsettled estimates, it is not given back a second time
        -- by their refunds.
        local cut_off = -bucket.max_debt - balance
        balance = -bucket.max_debt
        bucket.withheld = min(bucket.withheld + cut_off, min(all_estimated * bucket.unit, MAX_ESTIMATED))
      end
    end
    if is_known then
      local refund = min(min(credit, entry[ENTRY_NUMBERS + budget], all_estimated) * bucket.unit, MAX_ESTIMATED)
      local kept = min(refund, bucket.withheld)
      bucket.withheld = bucket.withheld - kept
      balance = min(balance + refund - kept, bucket.capacity)
    end
    bucket.balance = balance
  end
end
if is_forgiving == 1 then
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local debt = max(-bucket.balance, 0)
    local estimated = min(state[ESTIMATED + bucket.budget] * bucket.unit, MAX_ESTIMATED)
    bucket.balance = bucket.balance + debt
    bucket.withheld = min(bucket.withheld + debt, estimated)
  end
  is_announced = true
end
if is_probe == 0 then state.last_contact = now end
if not entry_at then entry = {ENTRY_ZEROS} end
entry.seen_at, entry.batch, entry[ENTRY_NUMBERS + count + 1] = now, batch, nil
for i = 1, count do
  -- The estimates of the other members, to which those of this member are added.
  local estimated, others = 0, state[ESTIMATED + i] - (entry_at and entry[ENTRY_NUMBERS + i] or 0)
  if others < 0 then others = 0 end
  if is_known then estimated = amounts[estimates + i] end
  entry[ENTRY_NUMBERS + i], state[ESTIMATED + i] = estimated, others + estimated
end
adapt_withheld()

-- 7. Reserve the costs in order. Each cost is admitted at the earliest time when all buckets have enough and the member
-- has the reply, but nothing is reserved further than max_ahead into the future. A cost that has to wait longer claims
-- the next reservation: until it has it, or gives up, no other cost of any member is reserved.
--
-- While the schedule reaches further than `ahead` into the future, each member with more demand than it was given gets
-- an equal part of it: `served_until` advances by the time that its reservations take, times the number of such members.

local reply = {REPLY_ZEROS}
-- The numbers of the reply are followed by what remains of each budget of the member, and then by the delays.
local delays_at = REPLY_LENGTH + budgets
for i = REPLY_LENGTH + 1, delays_at do
  reply[i] = -1
end
-- The estimates of this member grow by as much as the sums of all members, so only the sums are counted in the loop.
for i = 1, count do
  entry[ENTRY_NUMBERS + i] = entry[ENTRY_NUMBERS + i] - state[ESTIMATED + i]
end
local retry_in, reserved, scheduled_until = 0, 0, state.scheduled_until
local paused_until = max(user_paused_until, provider_paused_until)
local is_counted_as_wanting = entry.wants_until > state.swept_at
local sharing = is_counted_as_wanting and state.wanting or state.wanting + 1
if entry.served_until < now then entry.served_until = now end
local was_claiming = claimant == ARGV[2] and state.claimed_until > now
if was_claiming then state.claimed_until = 0 end
if is_missing then costs = 0 end
-- The earliest time of the next reservation.
local from = max(scheduled_until, paused_until, now + lead)
local served_from = entry.served_until - from * sharing
for _ = 1, costs do
  if from - now > max_ahead then
    retry_in = from - now - max_ahead
    break
  end
  if state.claimed_until > now then
    retry_in = max(state.claim_at - now - max_ahead, 1)
    break
  end
  local too_far = min(from, served_from + from * sharing) - now - ahead
  if too_far > 0 then
    retry_in = too_far
    break
  end
  local admitted_at, is_impossible = from, false
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local needed = amounts[cost_at + bucket.budget] * bucket.unit
    if needed > bucket.balance and needed > 0 then
      if needed > bucket.capacity then is_impossible = true end
      local filled_at = scheduled_until + ceil((needed - bucket.balance) / bucket.fill)
      if filled_at > admitted_at then admitted_at = filled_at end
    end
  end
  -- The cost exceeds a burst of the limits in force, which the member does not have yet. It learns them from the reply
  -- and rejects the call.
  if is_impossible then break end
  if admitted_at - now > max_ahead then
    claimant, state.claimed_until, state.claim_at = ARGV[2], now + CLAIM_EXPIRY, admitted_at
    retry_in = admitted_at - now - max_ahead
    break
  end
  if admitted_at > scheduled_until then
    advance_to(admitted_at)
    scheduled_until = admitted_at
  end
  from = admitted_at
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    bucket.balance = bucket.balance - amounts[cost_at + bucket.budget] * bucket.unit
  end
  -- The estimates grow by as much as the balances fall, so no more has to be withheld from refunds.
  for i = 1, count do
    state[ESTIMATED + i] = state[ESTIMATED + i] + amounts[cost_at + i]
  end
  cost_at, reserved = cost_at + count, reserved + 1
  reply[delays_at + reserved] = admitted_at - now
end
if reserved > 0 then entry.served_until = min(served_from + from * sharing, now + MAX_SERVED) end
if costs > reserved or is_backlogged == 1 then
  entry.wants_until = now + DEMAND_EXPIRY
  if not is_counted_as_wanting then state.wanting = state.wanting + 1 end
  is_counted_as_wanting = true
end
if is_leaving == 1 and is_counted_as_wanting then state.wanting = state.wanting - 1 end
-- The claim has ended earlier than the other members expect.
if was_claiming and state.claimed_until == 0 and state.claim_at - now > max_ahead then is_announced = true end

-- 8. Store the state, and reply to the member.

state.sequence = state.sequence + 1
for i = 1, count do
  entry[ENTRY_NUMBERS + i] = entry[ENTRY_NUMBERS + i] + state[ESTIMATED + i]
end
local own = ''
if is_leaving == 0 then own = ARGV[2] .. write(entry_format, values(entry)) end
if entry_at then
  entries = sub(entries, 1, entry_at - 1) .. own .. sub(entries, entry_at + entry_length)
else
  entries = entries .. own
end
state.members = #entries / entry_length

local until_full = 0
for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
  local full = ceil((bucket.capacity - bucket.balance) / bucket.fill)
  if full > until_full then until_full = full end
  local remaining = 0
  if bucket.balance > 0 then
    remaining = floor(bucket.balance / bucket.unit)
    if remaining * bucket.unit > bucket.balance then remaining = remaining - 1 end
  end
  local place = places and places[bucket.budget] or bucket.budget
  local least = reply[REPLY_LENGTH + place]
  if place > 0 and (remaining < least or least < 0) then reply[REPLY_LENGTH + place] = remaining end
end
-- After a state has expired, the next one begins with full buckets, so a state must not expire before its own buckets
-- are full.
local retention = floor((max(scheduled_until + until_full, paused_until) - now) / 1000) + MIN_RETENTION
-- The time to live is not set with every request, because that would cost as much as writing the state.
local is_too_short = state.expires_at - now < retention * 1000 - EXPIRY_SLACK
if is_too_short then state.expires_at = now + retention * 1000 end
state.names_length = #names
local packed = write(state_format, values(state)) .. entries .. claimant .. names .. text
if is_too_short then
  redis.call('SET', KEYS[1], packed, 'PX', retention)
else
  redis.call('SET', KEYS[1], packed, 'KEEPTTL')
end

if is_announced then
  local user, provider = max(user_paused_until - now, 0), max(provider_paused_until - now, 0)
  redis.call('PUBLISH', ARGV[3], string.format('%.0f %.0f', user, provider))
end

reply.version = VERSION
reply.sequence, reply.incarnation, reply.config_version = state.sequence, state.incarnation, state.config_version
reply.user_pause, reply.provider_pause = max(user_paused_until - now, 0), max(provider_paused_until - now, 0)
reply.members = state.members
if is_known then reply.is_known = 1 end
if state.claimed_until > now and claimant == ARGV[2] then reply.is_claiming = 1 end
reply.retention, reply.offset = retention, scheduled_until - now
reply.retry_in, reply.now, reply.reserved = retry_in, now, reserved
if state.config_version ~= config_version then
  reply[delays_at + 1 + reserved] = sub(text, 1, string.find(text, '\n', 1, true) - 1)
end
return reply
