// An HTTP server with Better Auth on PORT, for a front end whose origin is FRONT_END.
import { createServer } from 'node:http'
import { toNodeHandler } from 'better-auth/node'
import { auth } from './auth.js'

const handler = toNodeHandler(auth)

createServer((request, response) => {
  response.setHeader('Access-Control-Allow-Origin', process.env.FRONT_END)
  response.setHeader('Access-Control-Allow-Credentials', 'true')
  response.setHeader('Access-Control-Allow-Headers', 'Content-Type')
  if (request.method === 'OPTIONS') response.end()
  else handler(request, response)
}).listen(process.env.PORT, () => console.log('listening'))
