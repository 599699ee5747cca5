# The demo on a CPU:  docker build -t escort . && docker run --rm -v "$PWD/outputs:/escort/outputs" escort
# Other commands:     docker run --rm -it escort .venv/bin/python main.py --list methods
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /escort
# torch's default build brings CUDA's libraries along; PIP_EXTRA_INDEX_URL may name an index of builds without them
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
COPY Makefile requirements.txt requirements-dev.txt ./
RUN make env
COPY . .
CMD ["make", "demo"]
