# SPDX-License-Identifier: Apache-2.0

"""Asks `vllm serve` over HTTP with the `openai` client, every question at the same time; has no moellava.

Run as `python over_http.py JOB.json`. The job holds `url`, `model`, `messages` (one conversation for each question)
and `answers`, the file that gets the texts.
"""

import asyncio
import json
import sys
from pathlib import Path

from openai import AsyncOpenAI


async def main(job: dict) -> None:
    client = AsyncOpenAI(base_url=job["url"], api_key="none", max_retries=0, timeout=300)
    asked = (
        client.chat.completions.create(
            model=job["model"],
            messages=messages,
            max_tokens=job["max_tokens"],
            temperature=0,
            extra_body={"add_special_tokens": True},  # as transformers does; not every chat template begins with one
        )
        for messages in job["messages"]
    )
    answers = await asyncio.gather(*asked)
    texts = [answer.choices[0].message.content for answer in answers]
    Path(job["answers"]).write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
