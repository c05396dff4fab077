"""Writes the sources of Python's documentation, from Debian's unpacked package python3.13-doc, as a JSONL file of texts:

python docs/examples/python_doc.py FOLDER docs.jsonl
"""

import hashlib
import json
import sys
from pathlib import Path

if len(sys.argv) != 3:
    sys.exit("usage: python docs/examples/python_doc.py FOLDER docs.jsonl")
folder, out = map(Path, sys.argv[1:])
files = sorted((folder / "usr/share/doc/python3.13/html/_sources").rglob("*.txt"))
if not files:
    sys.exit(f"{folder}: holds no sources; unpack python3.13-doc there with dpkg-deb -x")
text = "".join(json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n" for file in files).encode()
out.write_bytes(text)
print(f"{len(files)} files, {len(text):,} bytes, SHA-256 {hashlib.sha256(text).hexdigest()}")
