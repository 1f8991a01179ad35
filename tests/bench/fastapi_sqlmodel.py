"""The classic stack, as its tutorials have it: FastAPI, SQLModel, an async session and a JWT dependency a request."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import BigInteger, Column, DateTime, Identity
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://"),
    pool_size=int(os.environ["POOL"]),
    pool_pre_ping=True,
)


def now() -> datetime:
    return datetime.now(UTC)


class TaskFields(SQLModel):
    title: str = Field(min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=2000)
    completed: bool = False


class TaskChanges(SQLModel):
    title: str | None = Field(default=None, min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=2000)
    completed: bool | None = None


class Task(TaskFields, table=True):
    id: int | None = Field(default=None, sa_column=Column(BigInteger, Identity(), primary_key=True))
    user_id: str = Field(primary_key=True)  # so that its UPDATE finds a row by the key that the table has
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))


class TaskAnswer(TaskFields):
    id: int
    user_id: str
    created_at: datetime
    updated_at: datetime


class TaskList(SQLModel):
    items: list[TaskAnswer]


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


def get_caller(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    try:
        claims = jwt.decode(credentials.credentials, os.environ["BETTER_AUTH_SECRET"], algorithms=["HS256"])
    except jwt.InvalidTokenError:
        raise HTTPException(401, "Invalid token") from None
    return str(claims["sub"])


Session = Annotated[AsyncSession, Depends(get_session)]
Caller = Annotated[str, Depends(get_caller)]

app = FastAPI()


async def owned(session: AsyncSession, task_id: int, caller: str) -> Task:
    task = (await session.exec(select(Task).where(Task.id == task_id, Task.user_id == caller))).first()
    if task is None:
        raise HTTPException(404, "Task not found")
    return task


async def saved(session: AsyncSession, task: Task) -> Task:
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return task


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/api/tasks", response_model=TaskList)
async def list_tasks(
    session: Session, caller: Caller, status: Literal["all", "pending", "completed"] = "all"
) -> dict[str, Any]:
    query = select(Task).where(Task.user_id == caller).order_by(col(Task.created_at).desc(), col(Task.id).desc())
    if status != "all":
        query = query.where(Task.completed == (status == "completed"))
    return {"items": (await session.exec(query)).all()}


@app.post("/api/tasks", response_model=TaskAnswer, status_code=201)
async def create_task(fields: TaskFields, session: Session, caller: Caller) -> Task:
    return await saved(session, Task(**fields.model_dump(), user_id=caller))


@app.get("/api/tasks/{task_id}", response_model=TaskAnswer)
async def get_task(task_id: int, session: Session, caller: Caller) -> Task:
    return await owned(session, task_id, caller)


@app.put("/api/tasks/{task_id}", response_model=TaskAnswer)
async def update_task(task_id: int, changes: TaskChanges, session: Session, caller: Caller) -> Task:
    task = await owned(session, task_id, caller)
    task.sqlmodel_update(changes.model_dump(exclude_unset=True))
    task.updated_at = now()
    return await saved(session, task)


@app.patch("/api/tasks/{task_id}/complete", response_model=TaskAnswer)
async def complete_task(task_id: int, session: Session, caller: Caller) -> Task:
    task = await owned(session, task_id, caller)
    task.completed = not task.completed
    task.updated_at = now()
    return await saved(session, task)


@app.delete("/api/tasks/{task_id}", status_code=204)
async def delete_task(task_id: int, session: Session, caller: Caller) -> None:
    await session.delete(await owned(session, task_id, caller))
    await session.commit()
