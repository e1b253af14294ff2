-- Serves one request of one member of a quota: reserves, settles estimates, pauses, changes the limits. The server runs
-- the script in one step, so members cannot overtake each other in the middle of it.
--
-- virtual_schedule.rs does the same in Rust, in the same steps, and a test compares the two. If you change one of the
-- two files, change the other.
--
-- This file is a template. Before it is loaded, script.rs replaces
--   state.NAME   by state[I]           a number of the stored state; the list of them is in script.rs
--   bucket.NAME  by state[bucket + I]  a number of a bucket, where `bucket` is the position of the bucket's first one
--   kind.NAME    by state[kind + I]    the same of what makes a bucket refuse calls, strict, or one of the calendar
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
-- ARGV[1]  the numbers of the request (wire.rs): a fixed list, then eight for each rate, then eight for each rate of a
--          special kind, then for each budget of the member what to refund, then for each what to charge, and so on, then
--          for each cost one number per budget
-- ARGV[2]  the name of the member, 16 bytes
-- ARGV[3]  the publish/subscribe channel on which pauses are announced to the members
-- ARGV[4]  the names of the member's budgets, separated by spaces
-- ARGV[5]  two lines: the member's limits, and the limits that it was started with. Left out if the member expects that
--          the stored state has the same version of the limits; an empty reply asks for a request with the limits.
--
-- The stored state is a string: the numbers of `state`, the sum of the unsettled estimates of each budget, the numbers
-- of each bucket, those of each special kind, an entry for each member (its name, the numbers of `entry`, its unsettled estimates of each budget), the
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
-- In bytes: the length of a rate and of a special kind in the request, which are eight numbers each.
local RATE, KIND = 64, 64

local REQUEST_NAMES, rates_at = read(REQUEST_FORMAT, ARGV[1])

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local state, entries, claimant, names, text
-- Whether members that wait have to send their requests again at once, because something has changed.
local is_announced = false
-- The positions of the first and of the last bucket in the state, and of the first and of the last special kind; the
-- length of a member's entry in bytes; the formats of the numbers in the state and in an entry.
local first_bucket, last_bucket, first_kind, last_kind, entry_length, state_format, entry_format
-- When the next window of the calendar begins, and the function that fills its bucket then.
local next_window, begin_windows = 2 ^ 53, nil

-- Creating a function costs more than calling it, so only the two functions that every request needs are created here.

-- Fills the buckets up to the time `target`. What overflows while estimates are unsettled is withheld from later
-- refunds: if the true cost had been charged instead of the estimate, the bucket would have been fuller, and the refund
-- would have overflowed too.
local function advance_to(target)
  if target >= next_window then begin_windows(target) end
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
  if #stored < 32 then return {0} end
  local stored_version, its_rates, its_budgets, its_kinds = read('<dddd', stored)
  if stored_version ~= VERSION then return {stored_version} end
  first_bucket = ESTIMATED + its_budgets + 1
  first_kind = first_bucket + BUCKET_LENGTH * its_rates
  local length = first_kind - 1 + KIND_LENGTH * its_kinds
  last_bucket, last_kind = first_kind - BUCKET_LENGTH, length - KIND_LENGTH + 1
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

if kinds > 0 or stored and state.kinds > 0 then
  -- Fills the buckets of the calendar whose windows have ended at the time `target`, and finds out when the next ones end.
  begin_windows = function(target)
    local DAY = 86400000000
    next_window = 2 ^ 53
    for kind = first_kind, last_kind, KIND_LENGTH do
      if kind.months > 0 or kind.days > 0 then
        if target >= kind.ends then
          local bucket = kind.bucket
          -- A new bucket is in no window yet, and holds its initial fill.
          if kind.ends > 0 then bucket.balance = bucket.capacity end
          local today = floor((target - kind.start) / DAY)
          local next_day, year = today + 1, 1970
          if kind.months > 0 then
            next_day = 0
            while next_day <= today do
              local february = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0) and 29 or 28
              for _, days in ipairs({31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}) do
                if next_day <= today then next_day = next_day + days end
              end
              year = year + 1
            end
          end
          kind.ends, kind.began_with = next_day * DAY + kind.start, bucket.capacity
        end
        next_window = min(next_window, kind.ends)
      end
    end
  end
  if stored then begin_windows(state.scheduled_until) end
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
  if not ARGV[5] and (not stored or config_version > state.config_version or begin_windows) then
    -- The member's limits are needed: the empty reply asks the member to send the request again, with its limits.
    -- Nothing has been written yet.
    return {}
  end

  -- Reserves nothing for `span` microseconds, in which members may use reservations of a lost state. Also empties the
  -- buckets if `is_emptied`, except for those of the calendar: what was taken out of these is known from the members,
  -- which report what was left.
  local function hold(span, is_emptied)
    if now > state.scheduled_until then advance_to(now) end
    if is_emptied then
      for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
        if bucket.fill > 0 then bucket.balance = min(bucket.balance, 0) end
      end
      state.emptied_at = now
    end
    state.scheduled_until = max(state.scheduled_until, now + span)
    advance_to(state.scheduled_until)
  end

  -- Lowers the buckets of the calendar to what this member has seen of a lost state: by as much as the lost state had less
  -- left than this one began with. What was taken since then stays taken.
  local function lower_windows()
    if string.match(text, '^[^\n]*') ~= string.match(ARGV[5], '^[^\n]*') then return end
    for kind = first_kind, last_kind, KIND_LENGTH do
      local bucket = kind.bucket
      -- The initial balance in the request is what was left.
      local left = read('<d', ARGV[1], rates_at + RATE * (bucket - first_bucket) / BUCKET_LENGTH + RATE - 16)
      if kind.ends > 0 and left < kind.began_with then
        bucket.balance = max(bucket.balance - (kind.began_with - left), -bucket.max_debt)
        kind.began_with = left
      end
    end
    adapt_withheld()
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
    local length = BUCKET_LENGTH * rates + KIND_LENGTH * kinds
    local specs = {read('<' .. rep('d', length), ARGV[1], rates_at)}
    for i = #state, ESTIMATED + 1, -1 do
      state[i] = nil
    end
    state.rates, state.budgets, state.kinds, names, text = rates, budgets, kinds, ARGV[4], ARGV[5]
    first_bucket, first_kind = ESTIMATED + budgets + 1, ESTIMATED + budgets + 1 + BUCKET_LENGTH * rates
    last_bucket, last_kind = first_kind - BUCKET_LENGTH, first_kind + KIND_LENGTH * (kinds - 1)
    state_format = '<' .. rep('d', first_bucket - 1 + length)
    entry_length, entry_format = NAME + 8 * (ENTRY_NUMBERS + budgets), sub('<dddddddddddd', 1, 1 + ENTRY_NUMBERS + budgets)
    for i = 1, budgets do
      state[ESTIMATED + i] = 0
    end
    for i = 1, length do
      state[first_bucket - 1 + i] = specs[i]
    end
    for kind = first_kind, last_kind, KIND_LENGTH do
      -- In the request, a kind names its rate by the position of that in the list, from 0 on.
      kind.bucket = first_bucket + BUCKET_LENGTH * kind.bucket
    end
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      -- In the request, this position has the number that step 3 reads: what the provider reports as remaining.
      bucket.withheld = 0
    end
    if kinds > 0 then begin_windows(state.scheduled_until) end
    for kind = first_kind, last_kind, KIND_LENGTH do
      local bucket = kind.bucket
      kind.began_with = bucket.balance
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
    -- A window of the calendar ends when it would have ended: otherwise it would begin again, with another whole amount.
    -- But if the clock was wrong by more than a window, the window is the one of the new time.
    for kind = first_kind, last_kind, KIND_LENGTH do
      local length = (kind.days + 30 * kind.months) * 86400000000
      if kind.ends - state.scheduled_until > 2 * length then kind.ends = 0 end
    end
    if begin_windows then begin_windows(state.scheduled_until) end
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
    if begin_windows then lower_windows() end
  elseif incarnation ~= 0 and state.sequence < sequence then
    -- The server went back to an old snapshot, or to a replica that lagged behind, so that the stored state is older
    -- than the member's last reply.
    is_stale = true
    hold(max_ahead, true)
    state.incarnation, state.began_full, state.sequence = max(now, state.incarnation + 1), 0, sequence
    forget_members()
    for kind = first_kind, last_kind, KIND_LENGTH do
      local bucket = kind.bucket
      kind.began_with = bucket.balance
    end
    if begin_windows then lower_windows() end
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

