// What Better Auth stores, for a first try: it is gone when the server stops.
import { memoryAdapter } from 'better-auth/adapters/memory'

export const database = memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] })
