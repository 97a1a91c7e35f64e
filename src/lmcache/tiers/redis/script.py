"""The accounting of the Redis tier, done by the server: one Lua script (Redis 6 and later, Valkey).

KEYS[1] is the hash tag T. The accounting has two keys: `T.index`, a hash of shard name -> "booked bytes, parts, o" with the sum
of the booked bytes as field `used`, and `T.uses`, a sorted set of shard name -> time of last use in microseconds. The o (open) is
present while the shard is being written; its time is then the end of the writer's lease plus 2^52, so that it sorts last.
Shard `name` has its header at `T/name` and its parts at `T/name.0`, `T/name.1` ... Verbs answer (result, used bytes, shards).

The server answers no other client while a script runs, so no call removes or touches more than `ENOUGH_KEYS` keys and one shard,
whatever the store holds. The answer says when work is left (`MORE`, `NOT_READY`), and the client calls again.

When one of the two keys was lost, or at a `clear`, the accounting starts anew: its keys are renamed to `T.index.torn` and
`T.uses.torn`. While one of these exists, each call removes some of the shards that they name, and no shard is booked. So any
client may continue at any time: the new accounting is empty and right, and old shards that remain are checked by their headers.
"""

from __future__ import annotations

import hashlib

ADMITTED = "go"
MORE = "more"
"""The call has removed as much as one call may, and more has to go."""
NOT_READY = "not ready"
"""Torn accounting is being emptied, and nothing is booked until that has ended."""
ENOUGH_KEYS = 256
"""A call that has removed so many keys stops. Clients touch no more keys in one call."""
MAX_PARTS = 511
"""The most parts of a shard, since one call handles all of them."""

_TEXT = rb"""
local call = redis.call
local tag, verb = KEYS[1], ARGV[1]
local index, uses = tag .. '.index', tag .. '.uses'
local torn_index, torn_uses = index .. '.torn', uses .. '.torn'
local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
local OPEN = 4503599627370496
local removed = 0

local function record(name, from)
  local bytes, parts, open = string.match(call('HGET', from or index, name) or '', '^(%d+) (%d+) (o?)$')
  return tonumber(bytes), tonumber(parts), open == 'o'
end

local function part_name(name, part) return string.format('%s/%s.%x', tag, name, part) end

local function part_names(name, parts)
  local names = {}
  for i = 1, parts do names[i] = part_name(name, i - 1) end
  return names
end

local function parts_there(name)
  local parts = 0
  while parts < MAX_PARTS and call('EXISTS', part_name(name, parts)) == 1 do parts = parts + 1 end
  return parts
end

local function unlink(name, parts)
  call('UNLINK', tag .. '/' .. name)
  if parts > 0 then call('UNLINK', unpack(part_names(name, parts))) end
end

local function forget(name, from, order)
  local bytes, parts = record(name, from)
  parts = parts or parts_there(name)
  unlink(name, parts)
  removed = removed + 1 + parts
  call('ZREM', order or uses, name)
  if bytes then
    call('HDEL', from or index, name)
    call('HINCRBY', from or index, 'used', -bytes)
  end
  return bytes or 0
end

local function is_whole(name, parts)
  return call('EXISTS', tag .. '/' .. name, unpack(part_names(name, parts))) == parts + 1
end

local function used() return tonumber(call('HGET', index, 'used') or 0) end

local function forget_all(names, from, order)
  for _, name in ipairs(names) do
    if removed >= ENOUGH_KEYS then return false end
    forget(name, from, order)
  end
  return true
end

local function evict(most, wanted)
  local total = used()
  while total > most - wanted do
    if removed >= ENOUGH_KEYS then return 'more' end
    local oldest = call('ZRANGEBYSCORE', uses, '-inf', OPEN, 'LIMIT', 0, 1)[1]
    if not oldest then return 'full' end
    total = total - forget(oldest)
  end
  return 'go'
end

local function book(name, bytes, parts, open, score)
  call('HSET', index, name, string.format('%d %d %s', bytes, parts, open))
  call('ZADD', uses, score, name)
end

local function touch(name, parts, at, ttl)
  call('ZADD', uses, at, name)
  if ttl > 0 then
    local names = part_names(name, parts)
    names[parts + 1] = tag .. '/' .. name
    for _, key in ipairs(names) do call('PEXPIRE', key, math.floor(ttl / 1000)) end
  end
end

local function answer(what)
  return { what, used(), call('ZCOUNT', uses, '-inf', OPEN) }
end

-- After a first write that needs no memory a script may continue although `maxmemory` is reached. A reservation must not.
if verb ~= 'reserve' then call('UNLINK', tag .. '.nothing') end

local function is_torn() return call('EXISTS', torn_index, torn_uses) > 0 end

local function tear()
  if call('EXISTS', index) == 1 then call('RENAME', index, torn_index) end
  if call('EXISTS', uses) == 1 then call('RENAME', uses, torn_uses) end
end

local function go_on_emptying()
  if call('EXISTS', torn_index) == 1 then
    local cursor = call('HGET', torn_index, 'cursor') or '0'
    local following, fields = unpack(call('HSCAN', torn_index, cursor, 'COUNT', ENOUGH_KEYS / 2))
    local names, keys, is_cut = {}, {}, false
    for i = 1, #fields, 2 do
      local parts = tonumber(string.match(fields[i + 1], '^%d+ (%d+) o?$'))
      is_cut = #keys >= ENOUGH_KEYS
      if is_cut then break end -- the same cursor finds what is left of these
      if parts then
        names[#names + 1], keys[#keys + 1] = fields[i], tag .. '/' .. fields[i]
        for _, key in ipairs(part_names(fields[i], parts)) do keys[#keys + 1] = key end
      end
    end
    if #names > 0 then
      call('UNLINK', unpack(keys))
      call('ZREM', torn_uses, unpack(names))
      call('HDEL', torn_index, unpack(names))
    end
    if is_cut then return end
    if following ~= '0' then return call('HSET', torn_index, 'cursor', following) end
    call('UNLINK', torn_index)
  end
  forget_all(call('ZRANGE', torn_uses, 0, ENOUGH_KEYS / 2 - 1), torn_index, torn_uses)
end

-- A server that drops keys by its own policy may have dropped one of the two keys: the other one names what must be removed.
local torn = is_torn()
if not torn and (verb == 'clear' or math.max(call('HLEN', index) - 1, 0) ~= call('ZCARD', uses)) then
  tear()
  torn = is_torn()
end
if torn and verb ~= 'mend' then -- a load sends mend for each shard, which need not wait for this
  go_on_emptying()
  torn = is_torn()
end
if torn and (verb == 'reserve' or verb == 'mend') then return answer('not ready') end

if verb == 'reserve' then
  local most, lease, ttl = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
  local name, bytes, parts = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
  local had, had_parts, is_open = record(name)
  local not_encoded = tonumber(ARGV[8]) -- what the shard takes without its codec
  if (had == bytes or had == not_encoded) and not is_open and is_whole(name, had_parts) then
    call('UNLINK', tag .. '.nothing')
    touch(name, had_parts, now, ttl)
    return answer('kept')
  end
  call('HINCRBY', index, 'used', 0) -- fails where `maxmemory` is reached
  if most > 0 and bytes > most then return answer('too large') end
  if had == bytes and is_open and call('ZSCORE', uses, name) - OPEN > now then
    -- another client writes the very same parts: the first to finish commits them
    call('ZADD', uses, OPEN + now + lease, name)
    return answer('go')
  end
  forget(name)
  unlink(name, parts)
  forget_all(call('ZRANGEBYSCORE', uses, OPEN, OPEN + now, 'LIMIT', 0, 100))
  if ttl > 0 then forget_all(call('ZRANGEBYSCORE', uses, '-inf', now - ttl, 'LIMIT', 0, 100)) end
  local room = most > 0 and evict(most, bytes) or 'go'
  if room ~= 'go' then return answer(room) end
  call('HINCRBY', index, 'used', bytes)
  book(name, bytes, parts, 'o', OPEN + now + lease)
  return answer('go')
elseif verb == 'commit' then
  local ttl, header = tonumber(ARGV[2]), ARGV[3]
  local name, bytes, parts = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  local had = record(name)
  if not had then unlink(name, parts) end
  if had ~= bytes then return answer('') end -- removed meanwhile, as if it were removed right after the commit
  local names = part_names(name, parts)
  if parts > 0 and call('EXISTS', unpack(names)) ~= parts then
    forget(name)
    return answer('full')
  end
  for _, key in ipairs(names) do call('PERSIST', key) end
  call('SET', tag .. '/' .. name, header)
  book(name, bytes, parts, '', now)
  touch(name, parts, now, ttl)
  return answer('')
elseif verb == 'shrink' then
  local before = used()
  evict(before, tonumber(ARGV[2]))
  return answer(string.format('%d', before - used()))
elseif verb == 'touch' then
  local ttl, first, known = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
  for i = 4, #ARGV do
    local had, parts, is_open = record(ARGV[i])
    local is_there = had and not is_open
    if is_there then touch(ARGV[i], parts, now - first - (i - 4), ttl) end
    known[i - 3] = is_there and '1' or '0'
  end
  return answer(table.concat(known))
elseif verb == 'mend' then
  local most, name, bytes, parts = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
  local had, had_parts, is_open = record(name)
  if not had then
    local room = not is_whole(name, parts) and 'full' or most > 0 and evict(most, bytes) or 'go'
    if room == 'full' then unlink(name, parts) end
    if room == 'go' then
      call('HINCRBY', index, 'used', bytes)
      book(name, bytes, parts, '', now)
    end
  elseif not is_open and not is_whole(name, had_parts) then
    forget(name)
  end
elseif verb == 'remove' then
  forget(ARGV[2])
end
return answer(torn and 'not ready' or '')
"""

_lines = (line.partition(b"--")[0].strip() for line in _TEXT.splitlines())
SCRIPT = b"local ENOUGH_KEYS, MAX_PARTS = %d, %d\n" % (ENOUGH_KEYS, MAX_PARTS) + b"\n".join(filter(None, _lines))
"""The script without comments and indentation, since every connection sends it once."""
DIGEST = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
"""The name that Redis gives it."""
