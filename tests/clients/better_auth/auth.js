// Better Auth with its plugin `jwt`, which signs tokens with a key pair and publishes the public key.
import { betterAuth } from 'better-auth'
import { jwt } from 'better-auth/plugins'
import { database } from './database.js'

export const auth = betterAuth({
  database,
  emailAndPassword: { enabled: true },
  trustedOrigins: [process.env.FRONT_END],
  plugins: [jwt()],
})
