"""The server: OpenAI's API over a `Host`, as a FastAPI application. `app.py` puts it together."""
