// A walk through the API with the README's typed client, every answer of which the compiler knows too.
import assert from 'node:assert/strict'
import { client, complete, create, list, type Task } from './tasks.js'

const MISSING = { task_id: 2 ** 53 }
const absent = { detail: 'Task not found' }

// The README's functions, beginning with a token that has expired.
const first: Task = await create('Buy milk', 'walk-1')
assert.deepEqual(await create('Buy milk', 'walk-1'), first)
assert.deepEqual(await list(), [first])
assert.deepEqual(await list('completed'), [])
const completed = await complete(first)
assert.deepEqual([completed.completed, await list('pending'), await list('completed')], [true, [], [completed]])
await assert.rejects(complete(first), { message: 'The task has changed since the version that If-Match names' })
await assert.rejects(create('Buy bread', 'walk-1'), {
  message: 'body is not the one that this Idempotency-Key was first sent with',
})
await assert.rejects(create(' ', 'walk-2'), { message: 'title must not be blank' })

// Every endpoint, with each of the forms that its types allow.
const task = { task_id: first.id }
const created = await client.POST('/api/tasks', { body: { title: 'b', description: null, completed: true } })
assert(created.data)
assert.equal(created.response.status, 201)
assert.equal(created.response.headers.get('Location'), `/api/tasks/${created.data.id}`)
assert.deepEqual({ ...created.data, description: null, completed: true, title: 'b' }, created.data)

const got = await client.GET('/api/tasks/{task_id}', { params: { path: task } })
assert.deepEqual(got.data, completed)

const described = await client.PUT('/api/tasks/{task_id}', { params: { path: task }, body: { description: 'c' } })
assert.deepEqual([described.data?.title, described.data?.description], ['Buy milk', 'c'])
const cleared = await client.PUT('/api/tasks/{task_id}', { params: { path: task }, body: { description: null } })
assert(cleared.data)
assert.deepEqual([cleared.data.title, cleared.data.description], ['Buy milk', null])
const whole = await client.PUT('/api/tasks/{task_id}', { params: { path: task }, body: cleared.data })
assert.equal(whole.data?.title, 'Buy milk')

const completion = '/api/tasks/{task_id}/complete'
const toggled = await client.PATCH(completion, { params: { path: task } })
assert.equal(toggled.data?.completed, false)
const set = await client.PATCH(completion, { params: { path: task }, body: { completed: false } })
assert.equal(set.data?.completed, false)
const toggledAgain = await client.PATCH(completion, { params: { path: task }, body: {} })
assert.equal(toggledAgain.data?.completed, true)
const toggledByNull = await client.PATCH(completion, { params: { path: task }, body: null })
assert.equal(toggledByNull.data?.completed, false)

// Conditions.
const etag = got.response.headers.get('ETag')
assert.equal(etag, `"${completed.updated_at}"`)
const stale = { path: task, header: { 'If-Match': etag } }
const moved = { detail: 'The task has changed since the version that If-Match names' }
for (const refused of [
  await client.PUT('/api/tasks/{task_id}', { params: stale, body: { title: 'lost' } }),
  await client.PATCH(completion, { params: stale }),
  await client.DELETE('/api/tasks/{task_id}', { params: stale }),
]) {
  assert.equal(refused.response.status, 412)
  assert.deepEqual(refused.error, moved)
}
for (const unchanged of [
  await client.GET('/api/tasks', { params: { header: { 'If-None-Match': '*' } } }),
  await client.GET('/api/tasks/{task_id}', { params: { path: task, header: { 'If-None-Match': '*' } } }),
]) {
  assert.equal(unchanged.response.status, 304)
  assert(!unchanged.data && !unchanged.error)
}

// Errors.
const invalid = await client.PUT('/api/tasks/{task_id}', { params: { path: task }, body: { title: '' } })
assert(invalid.error && 'errors' in invalid.error)
const fields: ('title' | 'description' | 'completed' | 'status' | 'task_id' | 'body')[] = invalid.error.errors.map(
  ({ field }) => field,
)
assert.deepEqual(fields, ['title'])
assert.deepEqual(invalid.error, {
  detail: 'title must not be blank',
  errors: [{ field: 'title', message: 'must not be blank' }],
})
for (const refused of [
  await client.GET('/api/tasks/{task_id}', { params: { path: MISSING } }),
  await client.PUT('/api/tasks/{task_id}', { params: { path: MISSING }, body: {} }),
  await client.PATCH(completion, { params: { path: MISSING } }),
  await client.DELETE('/api/tasks/{task_id}', { params: { path: MISSING } }),
]) {
  assert.equal(refused.response.status, 404)
  assert.deepEqual(refused.error, absent)
}

const deleted = await client.DELETE('/api/tasks/{task_id}', { params: { path: task } })
assert.equal(deleted.response.status, 204)
assert.equal(deleted.data, undefined)
