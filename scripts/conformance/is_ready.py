"""Exit 0 if the server at argv[1] takes requests."""

import sys
import urllib.request

try:
    urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
except OSError:
    sys.exit(1)
