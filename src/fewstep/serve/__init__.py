"""Serving: videos as jobs, streams that are watched while they are made, and the page that shows them.

One process answers (`app.py`), another one computes (`worker.py`); they talk in orders and news (`orders.py`). So a worker that
dies takes no connection with it, and a slow reader does not keep the worker from its next call.
"""
