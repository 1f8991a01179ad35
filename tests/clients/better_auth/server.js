// A Better Auth server for the tests: the `auth` of ./auth.js, and a page to run a front end's script on.
//
// PORT is where it listens. POST /test/rotate retires the newest key, so that the next token has one of its own.
import { toNodeHandler } from 'better-auth/node'
import { createServer } from 'node:http'
import { auth } from './auth.js'
import { tables } from './database.js'

const handler = toNodeHandler(auth)

createServer((request, response) => {
  if (request.url.startsWith('/api/auth/')) return handler(request, response)
  if (request.method === 'POST' && request.url === '/test/rotate') {
    for (const key of tables.jwks) key.expiresAt = new Date()
    return response.end()
  }
  response.setHeader('Content-Type', 'text/html').end('<!doctype html><title>A front end</title>')
}).listen(process.env.PORT, '127.0.0.1', () => console.log('listening'))
