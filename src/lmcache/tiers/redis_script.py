"""The books of the Redis tier, kept by the server itself: one Lua script (Redis 6 and later, Valkey), run with EVAL.

KEYS[1] is the hash tag T. The books are two keys, `T.index`, a hash of shard name -> "booked bytes, parts, o" with the sum of the
booked bytes as field `used`, and `T.uses`, a sorted set of shard name -> time of last use in microseconds. The o (open) is there
while the shard is being written; its time is then the end of the writer's lease plus 2^52, so that it sorts behind all others.
Shard `name` has its header at `T/name` and its parts at `T/name.0`, `T/name.1` ... Each verb answers (what, used bytes, shards).
"""

from __future__ import annotations

ADMITTED = "go"

SCRIPT = rb"""
local tag, verb = KEYS[1], ARGV[1]
local index, uses = tag .. '.index', tag .. '.uses'
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local OPEN = 4503599627370496
local UNKNOWN_PARTS = 64

local function record(name)
  local bytes, parts, open = string.match(redis.call('HGET', index, name) or '', '^(%d+) (%d+) (o?)$')
  return tonumber(bytes), tonumber(parts), open == 'o'
end

local function part_names(name, parts)
  local names = {}
  for i = 1, parts do names[i] = string.format('%s/%s.%x', tag, name, i - 1) end
  return names
end

local function unlink(name, parts)
  redis.call('UNLINK', tag .. '/' .. name)
  if parts > 0 then redis.call('UNLINK', unpack(part_names(name, parts))) end
end

local function forget(name)
  local bytes, parts = record(name)
  unlink(name, parts or UNKNOWN_PARTS)
  redis.call('ZREM', uses, name)
  if bytes then
    redis.call('HDEL', index, name)
    redis.call('HINCRBY', index, 'used', -bytes)
  end
  return bytes or 0
end

local function is_whole(name, parts)
  return redis.call('EXISTS', tag .. '/' .. name, unpack(part_names(name, parts))) == parts + 1
end

local function used() return tonumber(redis.call('HGET', index, 'used') or 0) end

local function forget_all(names)
  local freed = 0
  for _, name in ipairs(names) do freed = freed + forget(name) end
  return freed
end

local function evict(most, wanted)
  local total = used()
  while total > most - wanted do
    local oldest = redis.call('ZRANGEBYSCORE', uses, '-inf', OPEN, 'LIMIT', 0, 1)[1]
    if not oldest then return false end
    total = total - forget(oldest)
  end
  return true
end

local function book(name, bytes, parts, open, score)
  redis.call('HSET', index, name, string.format('%d %d %s', bytes, parts, open))
  redis.call('ZADD', uses, score, name)
end

local function touch(name, parts, at, ttl)
  redis.call('ZADD', uses, at, name)
  if ttl > 0 then
    local names = part_names(name, parts)
    names[parts + 1] = tag .. '/' .. name
    for _, key in ipairs(names) do redis.call('PEXPIRE', key, math.floor(ttl / 1000)) end
  end
end

local function answer(what)
  return { what, used(), redis.call('ZCOUNT', uses, '-inf', OPEN) }
end

-- After a first write that needs no memory a script may go on although `maxmemory` is reached. A reservation must not.
if verb ~= 'reserve' then redis.call('UNLINK', tag .. '.nothing') end

-- A server that drops keys by its own policy may have dropped one half of the books: the other half says what must go.
local records = redis.call('HLEN', index)
if math.max(records - 1, 0) ~= redis.call('ZCARD', uses) then
  local names = redis.call('HKEYS', index)
  for i = #names, 1, -1 do
    if names[i] == 'used' then table.remove(names, i) end
  end
  forget_all(names)
  forget_all(redis.call('ZRANGE', uses, 0, -1))
  redis.call('UNLINK', index, uses)
end

if verb == 'reserve' then
  local most, lease, ttl = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
  local name, bytes, parts = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
  local had, _, is_open = record(name)
  if had == bytes and not is_open and is_whole(name, parts) then
    redis.call('UNLINK', tag .. '.nothing')
    touch(name, parts, now, ttl)
    return answer('kept')
  end
  redis.call('HINCRBY', index, 'used', 0) -- fails where `maxmemory` is reached
  if most > 0 and bytes > most then return answer('too large') end
  if had == bytes and is_open and redis.call('ZSCORE', uses, name) - OPEN > now then
    -- somebody else writes the very same parts: whoever is done first commits them
    redis.call('ZADD', uses, OPEN + now + lease, name)
    return answer('go')
  end
  forget(name)
  unlink(name, parts)
  forget_all(redis.call('ZRANGEBYSCORE', uses, OPEN, OPEN + now, 'LIMIT', 0, 100))
  if ttl > 0 then forget_all(redis.call('ZRANGEBYSCORE', uses, '-inf', now - ttl, 'LIMIT', 0, 100)) end
  if most > 0 and not evict(most, bytes) then return answer('full') end
  redis.call('HINCRBY', index, 'used', bytes)
  book(name, bytes, parts, 'o', OPEN + now + lease)
  return answer('go')
elseif verb == 'commit' then
  local ttl, header = tonumber(ARGV[2]), ARGV[3]
  local name, bytes, parts = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  local had = record(name)
  if not had then unlink(name, parts) end
  if had ~= bytes then return answer('') end -- removed meanwhile, as if it had been right after
  local names = part_names(name, parts)
  if parts > 0 and redis.call('EXISTS', unpack(names)) ~= parts then
    forget(name)
    return answer('full')
  end
  for _, key in ipairs(names) do redis.call('PERSIST', key) end
  redis.call('SET', tag .. '/' .. name, header)
  book(name, bytes, parts, '', now)
  touch(name, parts, now, ttl)
  return answer('')
elseif verb == 'shrink' then
  evict(used(), tonumber(ARGV[3]))
elseif verb == 'touch' then
  local ttl, known = tonumber(ARGV[2]), {}
  for i = 3, #ARGV do
    local had, parts, is_open = record(ARGV[i])
    local is_there = had and not is_open
    if is_there then touch(ARGV[i], parts, now - (i - 3), ttl) end
    known[i - 2] = is_there and '1' or '0'
  end
  return answer(table.concat(known))
elseif verb == 'mend' then
  local most, name, bytes, parts = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
  local had, had_parts, is_open = record(name)
  if not had then
    if is_whole(name, parts) and (most == 0 or evict(most, bytes)) then
      redis.call('HINCRBY', index, 'used', bytes)
      book(name, bytes, parts, '', now)
    else
      unlink(name, parts)
    end
  elseif not is_open and not is_whole(name, had_parts) then
    forget(name)
  end
elseif verb == 'remove' then
  forget(ARGV[2])
elseif verb == 'clear' then
  forget_all(redis.call('ZRANGE', uses, 0, 499))
  if redis.call('ZCARD', uses) > 0 then return answer('more') end
end
return answer('')
"""
