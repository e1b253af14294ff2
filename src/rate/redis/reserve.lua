-- Answers one member of a fleet that shares a quota: reserves, settles, pauses, changes the limits.
--
-- frontier.rs does the same, step by step, in Rust, and says why; the two give equal answers. Everything is an integer
-- below 2^53, which doubles hold exactly: units in buckets, microseconds in times. Not to be done: to concatenate such a
-- number (14 digits are kept), to call TIME twice (it goes on meanwhile), to raise errors (their texts differ by version).
--
-- KEYS  1 the state
-- ARGV  1 the numbers of the ask  2 the member  3 where pauses are told
--       4 its limits, and in the next line what it was configured with; left out by who believes that they are known
local floor, ceil, max, min = math.floor, math.ceil, math.max, math.min
local numbers, pack, rep, values = struct.unpack, struct.pack, string.rep, unpack
local DEEPEST_DEBT, MOST_ESTIMATED = -2 ^ 51, 2 ^ 52
local MEMBER_LAPSES, SWEEP, RETURN, KEPT, SLACK = 15000000, 1000000, 1500000, 60000, 30000000

local ahead, knows_birth, knows_seq, horizon, knows_stamp, changes, leaves, probes, pausing, batch, alone, shares,
  credit_1, credit_2, debit_1, debit_2, spent_1, spent_2, estimated_1, estimated_2, lowers, rates, costs, at_rates =
  numbers('<ddddddddddddddddddddddd', ARGV[1])

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- The state is a list of numbers: these, and from FIRST on, six for each bucket: its budget (1 requests, 2 tokens), how
-- much a microsecond fills, units in one, capacity, balance, withheld. Behind them stands an entry for each member: its
-- name, when it was here, requests and tokens it has out, its last corrections. Then a text: the limits, and in the next
-- line what the member was configured with that brought them.
local COUNT, BIRTH, SEQ, AT, USED, LAST, PAUSE, STAMP, FRESH, SWEPT, MEMBERS, EMPTIED, EXPIRES, OUT_1, OUT_2, FIRST =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
local ENTRY, NAME = 48, 16
local s, entries, text, final

-- A function costs more to make than to call, so those that are seldom needed are made where they are.
local function advance_to(moment)
  local elapsed = moment - s[LAST]
  for b = FIRST, final, 6 do
    local balance, capacity = s[b + 4], s[b + 3]
    if elapsed * s[b + 1] < capacity - balance then
      balance = balance + elapsed * s[b + 1]
    else
      balance = capacity
    end
    s[b + 4] = balance
    local out = s[b] == 1 and s[OUT_1] or s[OUT_2]
    if out > 0 then
      local spilled = min(out * s[b + 2], MOST_ESTIMATED) - (capacity - balance)
      if spilled > s[b + 5] then s[b + 5] = spilled end
    end
  end
  s[LAST] = moment
end

-- Sets what is estimated, and what is withheld of it.
local function estimate(first, second)
  s[OUT_1], s[OUT_2] = first, second
  for b = FIRST, final, 6 do
    local out = min((s[b] == 1 and first or second) * s[b + 2], MOST_ESTIMATED)
    if s[b + 5] > out then s[b + 5] = out end
    local spilled = out - (s[b + 3] - s[b + 4])
    if out > 0 and spilled > s[b + 5] then s[b + 5] = spilled end
  end
end

local stored = redis.call('GET', KEYS[1])
if stored then
  local count = numbers('<d', stored)
  s = {numbers('<' .. rep('d', 15 + 6 * count), stored)}
  final = FIRST + 6 * count - 6
  -- Behind the numbers unpack tells where it has stopped.
  local from = s[FIRST + 6 * count]
  local to = from + ENTRY * s[MEMBERS]
  entries, text = string.sub(stored, from, to - 1), string.sub(stored, to)
  s[FIRST + 6 * count] = nil
end

local stale = false
if stored and now >= s[AT] and knows_stamp == s[STAMP] and changes == 0 and
  (knows_birth == 0 or knows_birth == s[BIRTH] and s[SEQ] >= knows_seq) then
  -- As nearly always: it knows what is here.
  s[AT] = now
else
  if not ARGV[4] and (not stored or knows_stamp > s[STAMP]) then
    -- They are not: please say it all.
    return {}
  end

  local function hold(span, empties)
    if now > s[LAST] then advance_to(now) end
    if empties then
      for b = FIRST, final, 6 do
        s[b + 4] = min(s[b + 4], 0)
      end
      s[EMPTIED] = now
    end
    s[LAST] = max(s[LAST], now + span)
  end

  local function quotient(a, b)
    local q = floor(a / b)
    if q * b > a then q = q - 1 end
    return q
  end

  -- The member's own buckets, as they begin.
  local function theirs()
    local sizes = {numbers('<' .. rep('d', 6 * rates), ARGV[1], at_rates)}
    s[COUNT], final = rates, FIRST + 6 * rates - 6
    for i = 1, 6 * rates do
      s[FIRST - 1 + i] = sizes[i]
    end
    for b = FIRST, final, 6 do
      s[b + 5] = 0
    end
    text = ARGV[4]
  end

  -- Takes over the member's limits. Returns whether there are more than before.
  local function configure()
    -- The whole part of a * b / c, for a < c.
    local function scaled(a, b, c)
      if a * b < 2 ^ 53 then return quotient(a * b, c) end
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
    local old = {{}, {}}
    for b = FIRST, final, 6 do
      table.insert(old[s[b]], {unit = s[b + 2], balance = s[b + 4], without = s[b + 4] - s[b + 5]})
    end
    for i = #s, FIRST, -1 do
      s[i] = nil
    end
    theirs()
    local next, more = {1, 1}, false
    for b = FIRST, final, 6 do
      local budget, unit = s[b], s[b + 2]
      local before = old[budget][next[budget]]
      next[budget] = next[budget] + 1
      if before then
        local function convert(units)
          local whole = quotient(units, before.unit)
          return whole * unit + scaled(units - whole * before.unit, unit, before.unit)
        end
        local kept = convert(before.balance)
        local out = min(s[OUT_1 - 1 + budget] * unit, MOST_ESTIMATED)
        s[b + 4] = max(min(kept, s[b + 3]), DEEPEST_DEBT)
        s[b + 5] = min(kept - convert(before.without), out)
      else
        more = true
      end
    end
    return more
  end

  local function forget()
    entries, s[MEMBERS] = '', 0
    estimate(0, 0)
  end

  if not stored then
    s, entries = {0, now, 0, now, 0, now, 0, now, 1, now, 0, 0, 0, 0, 0}, ''
    theirs()
    if knows_stamp ~= 0 then s[STAMP] = knows_stamp end
    if knows_birth ~= 0 then
      s[BIRTH], s[FRESH] = max(now, knows_birth + 1), 0
      hold(max(horizon, ahead), true)
    end
  end

  -- A clock that goes back takes everything along: no time has passed.
  local back = s[AT] - now
  if back > 0 then
    s[LAST], s[PAUSE], s[SWEPT], s[EMPTIED] = s[LAST] - back, max(s[PAUSE] - back, 0), s[SWEPT] - back, s[EMPTIED] - back
    s[EXPIRES], s[USED] = s[EXPIRES] - back, s[USED] - back
    local moved = {}
    for at = 1, #entries, ENTRY do
      local seen, first, second, last_batch = numbers('<dddd', entries, at + NAME)
      table.insert(moved, string.sub(entries, at, at + NAME - 1) .. pack('<dddd', seen - back, first, second, last_batch))
    end
    entries = table.concat(moved)
  end
  s[AT] = now

  if knows_birth ~= 0 and knows_birth ~= s[BIRTH] then
    stale = true
    if s[FRESH] == 1 then hold(max(horizon, ahead), true) else hold(horizon, false) end
    s[FRESH] = 0
  elseif knows_birth ~= 0 and s[SEQ] < knows_seq then
    stale = true
    hold(max(horizon, ahead), true)
    s[BIRTH], s[FRESH], s[SEQ] = max(now, s[BIRTH] + 1), 0, knows_seq
    forget()
  end

  if knows_stamp ~= s[STAMP] or changes == 1 then
    local is_new = false
    if knows_stamp == 0 then
      local line, own_line = string.find(text, '\n', 1, true), string.find(ARGV[4], '\n', 1, true)
      is_new = string.sub(ARGV[4], own_line) ~= string.sub(text, line) and
        string.sub(ARGV[4], 1, own_line) ~= string.sub(text, 1, line)
    end
    if changes == 1 or knows_stamp > s[STAMP] or is_new then
      if changes == 1 or knows_stamp == 0 then s[STAMP] = max(now, s[STAMP] + 1) else s[STAMP] = knows_stamp end
      local more = configure()
      estimate(s[OUT_1], s[OUT_2])
      if more then forget() end
    end
  end
end

if now > s[LAST] then advance_to(now) end
if pausing > 0 and now + pausing > s[PAUSE] then
  s[PAUSE] = now + pausing
  redis.call('PUBLISH', ARGV[3], string.format('%.0f', pausing))
end
-- What a member says of a rate is of its own limits.
if lowers > 0 and string.match(text, '^[^\n]*') == string.match(ARGV[4], '^[^\n]*') then
  for i = 1, rates do
    local left = numbers('<d', ARGV[1], at_rates + 48 * i - 8)
    local b = FIRST - 6 + 6 * i
    if left >= 0 and left * s[b + 2] < s[b + 4] then s[b + 4] = left * s[b + 2] end
  end
  estimate(s[OUT_1], s[OUT_2])
end

if now - s[SWEPT] >= SWEEP then
  local first, second, kept = 0, 0, {}
  for at = 1, #entries, ENTRY do
    local seen, a, b = numbers('<ddd', entries, at + NAME)
    if now - seen < MEMBER_LAPSES then
      first, second = first + a, second + b
      table.insert(kept, string.sub(entries, at, at + ENTRY - 1))
    end
  end
  entries = table.concat(kept)
  s[SWEPT], s[MEMBERS] = now, #kept
  estimate(first, second)
end

local before = string.find(entries, ARGV[2], 1, true)
while before and before % ENTRY ~= 1 do
  -- Numbers that look like its name.
  before = string.find(entries, ARGV[2], before + 1, true)
end
local known, is_heard = before and not stale, probes == 1
local own_1, own_2 = 0, 0
if before then
  local _, last_batch
  _, own_1, own_2, last_batch = numbers('<dddd', entries, before + NAME)
  if is_heard then batch = last_batch end
  is_heard = is_heard or known and last_batch == batch
end
if not is_heard then
  local began = now - alone
  if alone > 0 and s[USED] < began then
    -- Nobody was here since it was on its own, so all of them were: what has come in was theirs.
    for b = FIRST, final, 6 do
      s[b + 4] = min(s[b + 4], 0)
    end
    s[EMPTIED], s[LAST] = now, max(s[LAST], now + RETURN)
  end
  for b = FIRST, final, 6 do
    local credit, debit, spent, out = credit_1, debit_1, spent_1, min(own_1, s[OUT_1])
    if s[b] == 2 then credit, debit, spent, out = credit_2, debit_2, spent_2, min(own_2, s[OUT_2]) end
    local share = spent * s[b + 2]
    if s[EMPTIED] > began then share = min(share, ceil((now - s[EMPTIED]) * s[b + 1] / shares)) end
    local balance = max(max(s[b + 4] - share, DEEPEST_DEBT) - debit * s[b + 2], DEEPEST_DEBT)
    if known then
      local refund = min(min(credit, out) * s[b + 2], MOST_ESTIMATED)
      local kept = min(refund, s[b + 5])
      s[b + 5] = s[b + 5] - kept
      balance = min(balance + refund - kept, s[b + 3])
    end
    s[b + 4] = balance
  end
end
if probes == 0 then s[USED] = now end
local others_1, others_2 = s[OUT_1] - own_1, s[OUT_2] - own_2
if others_1 < 0 then others_1 = 0 end
if others_2 < 0 then others_2 = 0 end
if known then own_1, own_2 = estimated_1, estimated_2 else own_1, own_2 = 0, 0 end
estimate(others_1 + own_1, others_2 + own_2)

local answer = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
local again, goes, cost_at = 0, 0, at_rates + 48 * rates
local last, pause, first, second = s[LAST], s[PAUSE], 0, 0
for _ = 1, costs do
  local requests, tokens
  requests, tokens, cost_at = numbers('<dd', ARGV[1], cost_at)
  local go, never = last, false
  if pause > go then go = pause end
  if go - now > ahead then
    again = go - now - ahead
    break
  end
  for b = FIRST, final, 6 do
    local needed = (s[b] == 1 and requests or tokens) * s[b + 2]
    if needed > s[b + 4] and needed > 0 then
      if needed > s[b + 3] then never = true end
      local there = last + ceil((needed - s[b + 4]) / s[b + 1])
      if there > go then go = there end
    end
  end
  if never then break end
  if go > last then
    advance_to(go)
    last = go
  end
  for b = FIRST, final, 6 do
    s[b + 4] = s[b + 4] - (s[b] == 1 and requests or tokens) * s[b + 2]
  end
  -- What is estimated grows as the balance falls, so nothing more is withheld.
  s[OUT_1], s[OUT_2] = s[OUT_1] + requests, s[OUT_2] + tokens
  first, second = first + requests, second + tokens
  goes = goes + 1
  answer[13 + goes] = go - now
end

s[SEQ] = s[SEQ] + 1
local entry = ''
if leaves == 0 then entry = ARGV[2] .. pack('<dddd', now, own_1 + first, own_2 + second, batch) end
if before then
  entries = string.sub(entries, 1, before - 1) .. entry .. string.sub(entries, before + ENTRY)
else
  entries = entries .. entry
end
s[MEMBERS] = #entries / ENTRY

local ends, left_1, left_2 = 0, -1, -1
for b = FIRST, final, 6 do
  local full = ceil((s[b + 3] - s[b + 4]) / s[b + 1])
  if full > ends then ends = full end
  local left = 0
  if s[b + 4] > 0 then
    left = floor(s[b + 4] / s[b + 2])
    if left * s[b + 2] > s[b + 4] then left = left - 1 end
  end
  if s[b] == 1 then
    if left_1 < 0 or left < left_1 then left_1 = left end
  elseif left_2 < 0 or left < left_2 then
    left_2 = left
  end
end
local kept = floor((max(last + ends, pause) - now) / 1000) + KEPT
-- To say for how long each time would cost as much as to say what.
local is_short = s[EXPIRES] - now < kept * 1000 - SLACK
if is_short then s[EXPIRES] = now + kept * 1000 end
local state = pack('<' .. rep('d', 15 + 6 * s[COUNT]), values(s)) .. entries .. text
if is_short then redis.call('SET', KEYS[1], state, 'PX', kept) else redis.call('SET', KEYS[1], state, 'KEEPTTL') end

answer[1], answer[2], answer[3], answer[4], answer[5] = s[SEQ], s[BIRTH], s[STAMP], max(pause - now, 0), s[MEMBERS]
if known then answer[6] = 1 end
answer[7], answer[8], answer[9], answer[10], answer[11], answer[12], answer[13] =
  kept, last - now, left_1, left_2, again, now, goes
if s[STAMP] ~= knows_stamp then answer[14 + goes] = string.sub(text, 1, string.find(text, '\n', 1, true) - 1) end
return answer
