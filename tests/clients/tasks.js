// The user's tasks, by calls that are repeated until they are answered: none of them does anything twice.
import { api } from './api.js'

// Each call returns the status and, if the answer has one, its JSON.
async function call(method, path, { body, ...headers } = {}) {
  const options = { method, headers: { 'Content-Type': 'application/json', ...headers }, body: JSON.stringify(body) }
  for (let attempt = 1; ; attempt++) {
    const response = await api(path, { ...options, signal: AbortSignal.timeout(10_000) }).catch(() => null)
    const text = await response?.text().catch(() => null) // the connection may be lost halfway
    const json = response?.headers.get('Content-Type') === 'application/json' // and not a page of a proxy
    if (text != null && response.status < 500) return { status: response.status, json: json ? JSON.parse(text) : text }
    if (attempt === 10) throw new Error('The service cannot be reached')
    const seconds = Number(response?.headers.get('Retry-After')) || Math.random() * attempt // it may be a date
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000))
  }
}

const pathOf = (task) => `/api/tasks/${task.id}`

export const list = (status = 'all') => call('GET', `/api/tasks?status=${status}`)
export const create = (fields) => call('POST', '/api/tasks', { body: fields, 'Idempotency-Key': crypto.randomUUID() })
export const change = (task, fields) => call('PUT', pathOf(task), { body: fields })
export const toggle = (task) => call('PATCH', `${pathOf(task)}/complete`, { body: { completed: !task.completed } })
export const remove = (task) => call('DELETE', pathOf(task), { 'If-Match': `"${task.updated_at}"` })
