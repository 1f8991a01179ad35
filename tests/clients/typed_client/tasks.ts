// The client, and three calls of it. `npx openapi-typescript` makes ./schema.d.ts.
import createClient from 'openapi-fetch'
import { api } from './api.js'
import type { components, paths } from './schema.js'

export type Task = components['schemas']['Task']

export const client = createClient<paths>({ baseUrl: 'http://127.0.0.1:8000', fetch: api })

export async function list(status: 'all' | 'pending' | 'completed' = 'all'): Promise<Task[]> {
  const { data, error } = await client.GET('/api/tasks', { params: { query: { status } } })
  if (error) throw new Error(error.detail)
  return data.items
}

export async function create(title: string, key: string): Promise<Task> {
  const { data, error } = await client.POST('/api/tasks', {
    params: { header: { 'Idempotency-Key': key } },
    body: { title },
  })
  if (error) throw new Error(error.detail)
  return data
}

export async function complete({ id, updated_at }: Task): Promise<Task> {
  const { data, error } = await client.PATCH('/api/tasks/{task_id}/complete', {
    params: { path: { task_id: id }, header: { 'If-Match': `"${updated_at}"` } },
  })
  if (error) throw new Error(error.detail)
  return data
}
