// fetch, with the token of the user who is signed in at Better Auth. api('/api/tasks') asks the service.
const API_URL = 'http://127.0.0.1:8000'
const AUTH_URL = 'http://localhost:3001'

let token // a promise, so that calls at the same time ask for one token

// Call it after each sign-in and sign-out, or the next calls are still made for the user before.
export const forgetToken = () => (token = undefined)
addEventListener('focus', forgetToken) // somebody else may have signed in in another tab

async function fetchToken() {
  const response = await fetch(`${AUTH_URL}/api/auth/token`, { credentials: 'include' })
  if (!response.ok && response.status !== 401) throw new Error(`Better Auth answers ${response.status}`)
  return (await response.json()).token // undefined if nobody is signed in
}

export async function api(input, options) {
  const request = new Request(typeof input === 'string' ? API_URL + input : input, options)
  for (let attempt = 1; ; attempt++) {
    const current = (token ??= fetchToken())
    const jwt = await current.catch((error) => {
      forgetToken()
      throw error
    })
    const copy = request.clone() // a body can be sent only once
    if (jwt) copy.headers.set('Authorization', `Bearer ${jwt}`)
    const response = await fetch(copy)
    if (response.status !== 401) return response
    if (token === current) forgetToken() // it has expired, or nobody is signed in
    if (!jwt || attempt === 2) return response
  }
}
