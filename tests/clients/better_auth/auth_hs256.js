// Better Auth with tokens that TOKEN_SECRET signs (HS256). The service has it as BETTER_AUTH_SECRET.
import { betterAuth } from 'better-auth'
import { jwt } from 'better-auth/plugins'
import { SignJWT } from 'jose'
import { database } from './database.js'

const secret = new TextEncoder().encode(process.env.TOKEN_SECRET)
const sign = (payload) => new SignJWT(payload).setProtectedHeader({ alg: 'HS256', typ: 'JWT' }).sign(secret)
const jwks = { remoteUrl: 'https://not.used.example', keyPairConfig: { alg: 'HS256' } } // which `sign` needs beside it

export const auth = betterAuth({
  database,
  emailAndPassword: { enabled: true },
  trustedOrigins: [process.env.FRONT_END],
  plugins: [jwt({ jwks, jwt: { sign } })],
})
