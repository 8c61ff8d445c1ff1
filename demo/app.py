"""The demo as a Hugging Face Space; the page itself is in the package: gcpo_t2i/demo."""

import os

from gcpo_t2i.config import DemoConfig
from gcpo_t2i.demo.command import demo

if __name__ == "__main__":
    # A Space says where to listen; without it: this machine only, as `gcpo-t2i demo`.
    port = os.environ.get("GRADIO_SERVER_PORT")
    demo(DemoConfig(host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), port=int(port) if port else None))
