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

local amounts_at = rates_at + RATE * rates + KIND * kinds
local amounts = {read('<' .. rep('d', budgets * (AMOUNT_LISTS + costs)), ARGV[1], amounts_at)}
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
    -- 1.5 s. A bucket of the calendar has gained nothing meanwhile: what they report is taken from it.
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      if bucket.fill > 0 then bucket.balance = min(bucket.balance, 0) end
    end
    state.emptied_at, state.scheduled_until = now, max(state.scheduled_until, now + RETURN_TIME)
    advance_to(state.scheduled_until)
  end
  for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
    local budget = bucket.budget
    local all_estimated = state[ESTIMATED + budget]
    local credit, debit, usage = amounts[budget], amounts[debits + budget], amounts[usages + budget]
    local share = usage * bucket.unit
    if state.emptied_at > began and bucket.fill > 0 then
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
--
-- A cost that a rate which refuses calls does not hold now is refused, whether or not costs before it have to wait. It
-- takes nothing, and the costs behind it are not affected.

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
-- It counts from now on: a time since 1970 that is multiplied by the number of members is not exact in a double.
local served_from = entry.served_until - now - (from - now) * sharing
-- Numbers at the end of the reply, if there are rates of special kinds: how many costs are refused, and four for each of
-- these, which are its position in the request, the position of the budget in the member's list, how much is left of it,
-- and in how many microseconds there is enough.
local extra, refused, is_any_strict, is_any_refusing = nil, 0, false, false
for kind = first_kind, last_kind, KIND_LENGTH do
  extra, is_any_strict = {0}, is_any_strict or kind.lost_late > 0
  is_any_refusing = is_any_refusing or kind.refuses == 1
end
-- Returns the number of whole requests or tokens in `units`; 0 for a debt.
local whole = extra and function(units, unit)
  if units <= 0 then return 0 end
  local amount = floor(units / unit)
  return amount * unit > units and amount - 1 or amount
end
-- Refuses the cost if a rate that refuses calls does not hold it, and returns whether it did.
local refuse = is_any_refusing and function(position)
  for kind = first_kind, last_kind, KIND_LENGTH do
    local bucket = kind.bucket
    local balance, unit = bucket.balance, bucket.unit
    local needed = amounts[cost_at + bucket.budget] * unit
    if kind.refuses == 1 and needed > max(balance, 0) and needed <= bucket.capacity then
      local held_at = kind.ends
      if bucket.fill > 0 then held_at = state.scheduled_until + ceil((needed - balance) / bucket.fill) end
      local place = places and places[bucket.budget] or bucket.budget
      for _, number in ipairs({position, place, whole(balance, unit), held_at - now}) do
        table.insert(extra, number)
      end
      refused = refused + 1
      extra[1] = refused
      return true
    end
  end
  return false
end
for position = 1, costs do
  if not (refuse and refuse(position)) then
    local wait = from - now
    if wait > max_ahead then
      retry_in = wait - max_ahead
      break
    end
    if state.claimed_until > now then
      retry_in = max(state.claim_at - now - max_ahead, 1)
      break
    end
    local too_far = min(wait, served_from + wait * sharing) - ahead
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
        for kind = first_kind, last_kind, KIND_LENGTH do
          -- A bucket of the calendar is filled when the next window begins.
          if kind.bucket == bucket and kind.ends > 0 then filled_at = kind.ends end
        end
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
    if is_any_strict then
      -- The call may be made up to 5 ms later. The bucket of a strict rate loses what will have overflowed by then, at the
      -- provider, too. What would have overflowed without the unsettled estimates is withheld from refunds.
      for kind = first_kind, last_kind, KIND_LENGTH do
        local bucket = kind.bucket
        if kind.lost_late > 0 and amounts[cost_at + bucket.budget] > 0 then
          local filled = bucket.balance + kind.lost_late
          local room = max(bucket.capacity - filled, 0)
          bucket.balance = min(bucket.balance, bucket.capacity - kind.lost_late)
          local estimated = min(state[ESTIMATED + bucket.budget] * bucket.unit, MAX_ESTIMATED)
          if estimated - room > bucket.withheld then bucket.withheld = estimated - room end
        end
      end
    end
    for bucket = first_bucket, last_bucket, BUCKET_LENGTH do
      bucket.balance = bucket.balance - amounts[cost_at + bucket.budget] * bucket.unit
    end
    -- The estimates grow by as much as the balances fall, so no more has to be withheld from refunds.
    for i = 1, count do
      state[ESTIMATED + i] = state[ESTIMATED + i] + amounts[cost_at + i]
    end
    reserved = reserved + 1
    reply[delays_at + reserved] = admitted_at - now
  end
  cost_at = cost_at + count
end
if refuse then
  for position = cost_at / count - AMOUNT_LISTS + 1, costs do
    refuse(position)
    cost_at = cost_at + count
  end
end
if reserved > 0 then entry.served_until = now + min(served_from + (from - now) * sharing, MAX_SERVED) end
if costs > reserved + refused or is_backlogged == 1 then
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
  local fill = bucket.fill
  if fill > 0 then
    local full = ceil((bucket.capacity - bucket.balance) / fill)
    if full > until_full then until_full = full end
  end
  local remaining = 0
  if bucket.balance > 0 then
    remaining = floor(bucket.balance / bucket.unit)
    if remaining * bucket.unit > bucket.balance then remaining = remaining - 1 end
  end
  local place = places and places[bucket.budget] or bucket.budget
  local least = reply[REPLY_LENGTH + place]
  if place > 0 and (remaining < least or least < 0) then reply[REPLY_LENGTH + place] = remaining end
end
-- After the refused costs, `extra` has what is left of each rate that refuses calls or counts by the calendar.
for kind = first_kind, last_kind, KIND_LENGTH do
  local bucket = kind.bucket
  if kind.ends > 0 and bucket.balance < bucket.capacity then until_full = max(until_full, kind.ends - scheduled_until) end
  if kind.ends > 0 or kind.refuses == 1 then table.insert(extra, whole(bucket.balance, bucket.unit)) end
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
if extra then
  for _, number in ipairs(extra) do
    table.insert(reply, number)
  end
end
if state.config_version ~= config_version then
  reply[#reply + 1] = sub(text, 1, string.find(text, '\n', 1, true) - 1)
end
return reply
