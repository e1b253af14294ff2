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
-- ARGV[1]  the numbers of the request (wire.rs): a fixed list, then eight for each rate, then two for each cost
-- ARGV[2]  the name of the member, 16 bytes
-- ARGV[3]  the publish/subscribe channel on which pauses are announced to the members
-- ARGV[4]  two lines: the member's limits, and the limits that it was started with. Left out if the member expects that
--          the stored state has the same version of the limits; an empty reply asks for a request with the limits.
--
-- The stored state is a string: the numbers of `state`, the numbers of each bucket, an entry for each member (its name,
-- the time of its last request, its unsettled estimates in requests and tokens, the number of its last batch of
-- corrections), and the two lines of ARGV[4] from the member that set the limits.
local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min
local read, write, rep, values = struct.unpack, struct.pack, string.rep, unpack
-- In units: estimates are counted up to this number, so that no sum exceeds what doubles hold exactly.
local MAX_ESTIMATED = 2 ^ 52
-- All three in microseconds: see their descriptions in virtual_schedule.rs.
local MEMBER_EXPIRY, SWEEP_INTERVAL, RETURN_TIME = 15000000, 1000000, 1500000
-- In milliseconds: how much longer the key has to live than until the buckets are full and the pause has ended.
local MIN_RETENTION = 60000
-- In microseconds: the key's time to live is set again only if it is too short by more than this. So the key may expire
-- this much earlier, which store_view.rs knows.
local EXPIRY_SLACK = 30000000
-- In bytes: the length of a member's entry, and of the name that the entry begins with.
local ENTRY, NAME = 48, 16
-- In bytes: the length of a rate in the request, which is eight numbers.
local RATE = 64

local REQUEST_NAMES, rates_at = read(REQUEST_FORMAT, ARGV[1])

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local state, entries, text, last_bucket

-- Creating a function costs more than calling it, so only the two functions that every request needs are created here.

-- Fills the buckets up to the time `target`. What overflows while estimates are unsettled is withheld from later
-- refunds: if the true cost had been charged instead of the estimate, the bucket would have been fuller, and the refund
-- would have overflowed too.
local function advance_to(target)
  local elapsed = target - state.scheduled_until
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    local balance, capacity = bucket.balance, bucket.capacity
    if elapsed * bucket.fill < capacity - balance then
      balance = balance + elapsed * bucket.fill
    else
      balance = capacity
    end
    bucket.balance = balance
    local estimated = bucket.budget == 1 and state.estimated_requests or state.estimated_tokens
    if estimated > 0 then
      local spilled = min(estimated * bucket.unit, MAX_ESTIMATED) - (capacity - balance)
      if spilled > bucket.withheld then bucket.withheld = spilled end
    end
  end
  state.scheduled_until = target
end

-- Sets the sum of the unsettled estimates of all members, and adapts what is withheld from refunds.
local function set_estimated(requests, tokens)
  state.estimated_requests, state.estimated_tokens = requests, tokens
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    local estimated = min((bucket.budget == 1 and requests or tokens) * bucket.unit, MAX_ESTIMATED)
    if bucket.withheld > estimated then bucket.withheld = estimated end
    local spilled = estimated - (bucket.capacity - bucket.balance)
    if estimated > 0 and spilled > bucket.withheld then bucket.withheld = spilled end
  end
end

-- 1. Read the stored state.

local stored = redis.call('GET', KEYS[1])
if stored then
  local count = read('<d', stored)
  state = {read('<' .. rep('d', STATE_LENGTH + BUCKET_LENGTH * count), stored)}
  last_bucket = FIRST_BUCKET + BUCKET_LENGTH * count - BUCKET_LENGTH
  -- The last value that was read is no number of the state: it is the position where reading stopped.
  local from = state[FIRST_BUCKET + BUCKET_LENGTH * count]
  local to = from + ENTRY * state.members
  entries, text = string.sub(stored, from, to - 1), string.sub(stored, to)
  state[FIRST_BUCKET + BUCKET_LENGTH * count] = nil
end

-- 2. Compare the stored state with what the member has seen: state may be lost, limits may differ, the clock may have
-- gone back.

-- Whether the stored state lacks something that this member was promised by a reply, such as a reservation.
local is_stale = false
if stored and now >= state.clock and config_version == state.config_version and is_change == 0 and
  (incarnation == 0 or incarnation == state.incarnation and state.sequence >= sequence) then
  -- This is the usual case: the stored state is the one that the member has seen.
  state.clock = now
else
  if not ARGV[4] and (not stored or config_version > state.config_version) then
    -- The member's limits are needed: the empty reply asks the member to send the request again, with its limits.
    -- Nothing has been written yet.
    return {}
  end

  -- Reserves nothing for `span` microseconds, in which members may use reservations of a lost state. Also empties the
  -- buckets if `is_emptied`.
  local function hold(span, is_emptied)
    if now > state.scheduled_until then advance_to(now) end
    if is_emptied then
      for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
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

  -- Replaces the buckets by new ones for the member's limits.
  local function create_buckets()
    local specs = {read('<' .. rep('d', BUCKET_LENGTH * rates), ARGV[1], rates_at)}
    state.rates, last_bucket = rates, FIRST_BUCKET + BUCKET_LENGTH * rates - BUCKET_LENGTH
    for i = 1, BUCKET_LENGTH * rates do
      state[FIRST_BUCKET - 1 + i] = specs[i]
    end
    for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
      -- In the request, this position has the number that step 3 reads: what the provider reports as remaining.
      bucket.withheld = 0
    end
    text = ARGV[4]
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
    for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
      local without = bucket.balance - bucket.withheld
      table.insert(old, {
        budget = bucket.budget, period = bucket.period, unit = bucket.unit, balance = bucket.balance, without = without
      })
    end
    for i = #state, FIRST_BUCKET, -1 do
      state[i] = nil
    end
    create_buckets()
    -- A rate takes over the bucket of the old rate with the same budget and period, or else that of the first old rate
    -- of its budget that is left over.
    for _, same_period in ipairs({true, false}) do
      for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
        for _, before in ipairs(old) do
          if not successor_of[bucket] and not before.is_taken and before.budget == bucket.budget and
            (not same_period or before.period == bucket.period) then
            before.is_taken, successor_of[bucket] = true, before
          end
        end
      end
    end
    local is_any_new = false
    for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
      local budget, unit = bucket.budget, bucket.unit
      local before = successor_of[bucket]
      if before then
        local function convert(units)
          local whole = quotient(units, before.unit)
          return whole * unit + scaled(units - whole * before.unit, unit, before.unit)
        end
        local balance = convert(before.balance)
        local amount = budget == 1 and state.estimated_requests or state.estimated_tokens
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
    entries, state.members = '', 0
    set_estimated(0, 0)
  end

  if not stored then
    state, entries = {0, now, 0, now, 0, now, 0, 0, now, 1, now, 0, 0, 0, 0, 0}, ''
    create_buckets()
    if config_version ~= 0 then state.config_version = config_version end
    if incarnation ~= 0 then
      -- The member has seen a state that is lost. What other members have taken from that state cannot be found out, so
      -- the buckets begin empty.
      state.incarnation, state.began_full = max(now, incarnation + 1), 0
      hold(max(last_reservation, max_ahead), true)
    end
  end

  -- If the server's clock went back, all stored times are moved back with it, so that no time has passed.
  local back = state.clock - now
  if back > 0 then
    state.scheduled_until = state.scheduled_until - back
    state.user_paused_until = max(state.user_paused_until - back, 0)
    state.provider_paused_until = max(state.provider_paused_until - back, 0)
    state.swept_at, state.emptied_at = state.swept_at - back, state.emptied_at - back
    state.expires_at, state.last_contact = state.expires_at - back, state.last_contact - back
    local moved = {}
    for at = 1, #entries, ENTRY do
      local seen, requests, tokens, last_batch = read('<dddd', entries, at + NAME)
      local numbers = write('<dddd', seen - back, requests, tokens, last_batch)
      table.insert(moved, string.sub(entries, at, at + NAME - 1) .. numbers)
    end
    entries = table.concat(moved)
  end
  state.clock = now

  if incarnation ~= 0 and incarnation ~= state.incarnation then
    is_stale = true
    -- A state that began with full buckets was not informed of the earlier one that this member has seen.
    if state.began_full == 1 then hold(max(last_reservation, max_ahead), true) else hold(last_reservation, false) end
    state.began_full = 0
  elseif incarnation ~= 0 and state.sequence < sequence then
    -- The server went back to an old snapshot, or to a replica that lagged behind, so that the stored state is older
    -- than the member's last reply.
    is_stale = true
    hold(max(last_reservation, max_ahead), true)
    state.incarnation, state.began_full, state.sequence = max(now, state.incarnation + 1), 0, sequence
    forget_members()
  end

  if config_version ~= state.config_version or is_change == 1 then
    local is_new = false
    if config_version == 0 then
      -- A member that has just started brings its limits, unless they are in force or were replaced since.
      local line_end, own_line_end = string.find(text, '\n', 1, true), string.find(ARGV[4], '\n', 1, true)
      is_new = string.sub(ARGV[4], own_line_end) ~= string.sub(text, line_end) and
        string.sub(ARGV[4], 1, own_line_end) ~= string.sub(text, 1, line_end)
    end
    if is_change == 1 or config_version > state.config_version or is_new then
      if is_change == 1 or config_version == 0 then
        state.config_version = max(now, state.config_version + 1)
      else
        state.config_version = config_version
      end
      local is_any_new = configure()
      set_estimated(state.estimated_requests, state.estimated_tokens)
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
  local user, provider = max(user_paused_until - now, 0), max(provider_paused_until - now, 0)
  redis.call('PUBLISH', ARGV[3], string.format('%.0f %.0f', user, provider))
end
-- The reported amounts belong to the rates of the member's limits, so they are used only if these limits are in force.
if lowered > 0 and string.match(text, '^[^\n]*') == string.match(ARGV[4], '^[^\n]*') then
  for i = 1, rates do
    local remaining = read('<d', ARGV[1], rates_at + RATE * i - 8)
    local bucket = FIRST_BUCKET - BUCKET_LENGTH + BUCKET_LENGTH * i
    if remaining >= 0 and remaining * bucket.unit < bucket.balance then bucket.balance = remaining * bucket.unit end
  end
  set_estimated(state.estimated_requests, state.estimated_tokens)
end

-- 4. Remove the members that have sent no request for 15 s.

if now - state.swept_at >= SWEEP_INTERVAL then
  local requests, tokens, kept = 0, 0, {}
  for at = 1, #entries, ENTRY do
    local seen, its_requests, its_tokens = read('<ddd', entries, at + NAME)
    if now - seen < MEMBER_EXPIRY then
      requests, tokens = requests + its_requests, tokens + its_tokens
      table.insert(kept, string.sub(entries, at, at + ENTRY - 1))
    end
  end
  entries = table.concat(kept)
  state.swept_at, state.members = now, #kept
  set_estimated(requests, tokens)
end

-- 5. Settle the corrections (true cost minus estimate) that the member reports.

local entry_at = string.find(entries, ARGV[2], 1, true)
while entry_at and entry_at % ENTRY ~= 1 do
  -- This match is not the start of an entry: the numbers in some entry look like the name.
  entry_at = string.find(entries, ARGV[2], entry_at + 1, true)
end
-- A batch of corrections is counted once: if its reply was lost, the member sends it again with the same number.
local is_known, is_counted = entry_at and not is_stale, is_probe == 1
local own_requests, own_tokens = 0, 0
if entry_at then
  local _, last_batch
  _, own_requests, own_tokens, last_batch = read('<dddd', entries, entry_at + NAME)
  if is_counted then batch = last_batch end
  is_counted = is_counted or is_known and last_batch == batch
end
if not is_counted then
  local began = now - fallback_age
  if fallback_age > 0 and state.last_contact < began then
    -- No member has reached the store since this member lost it. So all members admitted calls by their local
    -- fallbacks, and have used what would be in the buckets now. They come back and report their usage within
    -- 1.5 s.
    for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
      bucket.balance = min(bucket.balance, 0)
    end
    state.emptied_at, state.scheduled_until = now, max(state.scheduled_until, now + RETURN_TIME)
  end
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    local credit, debit, usage = credit_requests, debit_requests, fallback_requests
    local estimated = min(own_requests, state.estimated_requests)
    if bucket.budget == 2 then
      credit, debit, usage = credit_tokens, debit_tokens, fallback_tokens
      estimated = min(own_tokens, state.estimated_tokens)
    end
    local share = usage * bucket.unit
    if state.emptied_at > began then
      -- If the buckets were emptied after the member had begun to admit calls locally, this has paid for its usage
      -- until then. Since then it can have used no more than its share of the rate, so no more is charged.
      share = min(share, ceil((now - state.emptied_at) * bucket.fill / member_count))
    end
    local all_estimated = bucket.budget == 1 and state.estimated_requests or state.estimated_tokens
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
      local refund = min(min(credit, estimated) * bucket.unit, MAX_ESTIMATED)
      local kept = min(refund, bucket.withheld)
      bucket.withheld = bucket.withheld - kept
      balance = min(balance + refund - kept, bucket.capacity)
    end
    bucket.balance = balance
  end
end
if is_forgiving == 1 then
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    local debt = max(-bucket.balance, 0)
    local estimated = bucket.budget == 1 and state.estimated_requests or state.estimated_tokens
    bucket.balance = bucket.balance + debt
    bucket.withheld = min(bucket.withheld + debt, min(estimated * bucket.unit, MAX_ESTIMATED))
  end
end
if is_probe == 0 then state.last_contact = now end
local other_requests, other_tokens = state.estimated_requests - own_requests, state.estimated_tokens - own_tokens
if other_requests < 0 then other_requests = 0 end
if other_tokens < 0 then other_tokens = 0 end
if is_known then
  own_requests, own_tokens = estimated_requests, estimated_tokens
else
  own_requests, own_tokens = 0, 0
end
set_estimated(other_requests + own_requests, other_tokens + own_tokens)

-- 6. Reserve the costs in order, until the schedule reaches further than max_ahead into the future. Each cost is
-- admitted at the earliest time when all buckets have enough.

local reply = {REPLY_ZEROS}
local retry_in, reserved, cost_at = 0, 0, rates_at + RATE * rates
local scheduled_until, all_requests, all_tokens = state.scheduled_until, 0, 0
local paused_until = max(user_paused_until, provider_paused_until)
for _ = 1, costs do
  local requests, tokens
  requests, tokens, cost_at = read('<dd', ARGV[1], cost_at)
  local admitted_at, is_impossible = scheduled_until, false
  if paused_until > admitted_at then admitted_at = paused_until end
  if admitted_at - now > max_ahead then
    retry_in = admitted_at - now - max_ahead
    break
  end
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    local needed = (bucket.budget == 1 and requests or tokens) * bucket.unit
    if needed > bucket.balance and needed > 0 then
      if needed > bucket.capacity then is_impossible = true end
      local filled_at = scheduled_until + ceil((needed - bucket.balance) / bucket.fill)
      if filled_at > admitted_at then admitted_at = filled_at end
    end
  end
  -- The cost exceeds a burst of the limits in force, which the member does not have yet. It learns them from the reply
  -- and rejects the call.
  if is_impossible then break end
  if admitted_at > scheduled_until then
    advance_to(admitted_at)
    scheduled_until = admitted_at
  end
  for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
    bucket.balance = bucket.balance - (bucket.budget == 1 and requests or tokens) * bucket.unit
  end
  -- The estimates grow by as much as the balances fall, so no more has to be withheld from refunds.
  state.estimated_requests = state.estimated_requests + requests
  state.estimated_tokens = state.estimated_tokens + tokens
  all_requests, all_tokens = all_requests + requests, all_tokens + tokens
  reserved = reserved + 1
  reply[REPLY_LENGTH + reserved] = admitted_at - now
end

-- 7. Store the state, and reply to the member.

state.sequence = state.sequence + 1
local entry = ''
if is_leaving == 0 then
  entry = ARGV[2] .. write('<dddd', now, own_requests + all_requests, own_tokens + all_tokens, batch)
end
if entry_at then
  entries = string.sub(entries, 1, entry_at - 1) .. entry .. string.sub(entries, entry_at + ENTRY)
else
  entries = entries .. entry
end
state.members = #entries / ENTRY

local until_full, remaining_requests, remaining_tokens = 0, -1, -1
for bucket = FIRST_BUCKET, last_bucket, BUCKET_LENGTH do
  local full = ceil((bucket.capacity - bucket.balance) / bucket.fill)
  if full > until_full then until_full = full end
  local remaining = 0
  if bucket.balance > 0 then
    remaining = floor(bucket.balance / bucket.unit)
    if remaining * bucket.unit > bucket.balance then remaining = remaining - 1 end
  end
  if bucket.budget == 1 then
    if remaining_requests < 0 or remaining < remaining_requests then remaining_requests = remaining end
  elseif remaining_tokens < 0 or remaining < remaining_tokens then
    remaining_tokens = remaining
  end
end
-- After a state has expired, the next one begins with full buckets, so a state must not expire before its own buckets
-- are full.
local retention = floor((max(scheduled_until + until_full, paused_until) - now) / 1000) + MIN_RETENTION
-- The time to live is not set with every request, because that would cost as much as writing the state.
local is_too_short = state.expires_at - now < retention * 1000 - EXPIRY_SLACK
if is_too_short then state.expires_at = now + retention * 1000 end
local packed = write('<' .. rep('d', STATE_LENGTH + BUCKET_LENGTH * state.rates), values(state)) .. entries .. text
if is_too_short then
  redis.call('SET', KEYS[1], packed, 'PX', retention)
else
  redis.call('SET', KEYS[1], packed, 'KEEPTTL')
end

reply.sequence, reply.incarnation, reply.config_version = state.sequence, state.incarnation, state.config_version
reply.user_pause, reply.provider_pause = max(user_paused_until - now, 0), max(provider_paused_until - now, 0)
reply.members = state.members
if is_known then reply.is_known = 1 end
reply.retention, reply.offset = retention, scheduled_until - now
reply.remaining_requests, reply.remaining_tokens = remaining_requests, remaining_tokens
reply.retry_in, reply.now, reply.reserved = retry_in, now, reserved
if state.config_version ~= config_version then
  reply[REPLY_LENGTH + 1 + reserved] = string.sub(text, 1, string.find(text, '\n', 1, true) - 1)
end
return reply
