# The server in a container, on the CPU:
#   docker build -t fewstep .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/served:/served" -v "$PWD/served.keys:/served.keys:ro" fewstep
# On a GPU: what comes after the image's name replaces the last line of this file.
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v "$PWD/served:/served" -v "$PWD/served.keys:/served.keys:ro" fewstep \
#     world/stream world --device cuda --host 0.0.0.0 --port 8000 --watch-port 9000 --folder /served --keys /served.keys
# TORCH_INDEX takes torch from another index, such as one with builds for the CPU alone.
FROM python:3.12-slim

ARG TORCH_INDEX=""
ENV PIP_EXTRA_INDEX_URL=$TORCH_INDEX
WORKDIR /opt/fewstep
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir ".[serve,postgres,diffusers]" \
    && useradd --uid 1000 --create-home fewstep \
    && install --directory --owner fewstep /served

USER 1000
VOLUME /served
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fewstep", "serve"]
CMD ["world/stream", "world", "--host", "0.0.0.0", "--port", "8000", "--watch-port", "9000", "--folder", "/served", "--keys", "/served.keys"]
