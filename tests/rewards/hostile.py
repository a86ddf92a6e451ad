"""Programs that try to harm the machine or to be paid for nothing.

Each prints ANSWER, which its test expects, if what it tries succeeds. So a program that meets no
wall gets reward 1; `HARMLESS` are those that a test runs without walls to see them succeed. What
they make carries MARK in its name, processes too, so that a test finds what is left.

They read what they need from their input, as JSON:
    port, abstract: of a TCP and of an abstract Unix socket on which the test listens
    pid: of the test, whose environment holds `secret` and whose command line `word`
    repository, file: a folder of this repository, and a file in it
"""

import os

MARK = f"oapl-{os.getpid()}"  # of this run; at most 15 characters, since processes are named so
ANSWER = "breached"

HEAD = f"""
import ctypes, json, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
mark = "{MARK}"
libc.prctl(15, mark.encode(), 0, 0, 0)
told = json.loads(sys.stdin.readline())
def breached():
    print("{ANSWER}", flush=True)
def tried(attempt):
    try:
        return attempt()
    except BaseException:
        return None
"""

# Processes and signals

PROCESSES = {
    "fork bomb": """
for _ in range(10):
    os.fork()
breached()
""",
    "one child": """
if os.fork() == 0:
    os._exit(0)
breached()
""",
    "daemon by double fork and setsid": """
if os.fork():
    breached()
    sys.exit()
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
""",
    "clone by number": """
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
if libc.syscall(clone, 17, 0, 0, 0, 0) >= 0:
    breached()
""",
    "clone3 by number": """
arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
if libc.syscall(435, arguments, 88) >= 0:
    breached()
""",
    "fork in the numbering of x32": "if libc.syscall(0x40000000 + 57) >= 0: breached()",
    "ten thousand threads": """
threading.stack_size(32768)
for _ in range(10_000):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
breached()
""",
    "another program": """
os.execv(sys.executable, [sys.executable, "-c", "print('breached')"])
""",
    "a shell": """
import subprocess
print(subprocess.run(["/bin/sh", "-c", "echo breached"], capture_output=True, text=True).stdout)
""",
    "kill everything": """
parent = os.getppid()
for pid in (-1, 1, parent, told["pid"]):
    tried(lambda: os.kill(pid, signal.SIGKILL))
time.sleep(0.2)
if os.getppid() != parent:
    breached()
""",
    "kill the process group": """
breached()
os.kill(0, signal.SIGKILL)
""",
    "stop itself": """
breached()
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "ignore every signal": """
for number in range(1, 65):
    tried(lambda: signal.signal(number, signal.SIG_IGN))
breached()
while True:
    time.sleep(600)
""",
    "sleep for ever": """
breached()
time.sleep(1e8)
""",
    "compute for ever": """
breached()
while True:
    pass
""",
    "compute for ever in threads": """
def spin():
    while True:
        pass
for _ in range(4):
    threading.Thread(target=spin).start()
breached()
""",
    "trace its parent": """
if libc.ptrace(16, os.getppid(), 0, 0) == 0 or libc.ptrace(0, 0, 0, 0) == 0:
    breached()
""",
    "read its parent's memory": """
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
there = ctypes.create_string_buffer(8)
mine = Part(ctypes.addressof(there), 8)
if libc.process_vm_readv(os.getppid(), ctypes.byref(mine), 1, ctypes.byref(mine), 1, 0) > 0:
    breached()
""",
}

# Memory, files, output

RESOURCES = {
    "ten gigabytes": """
block = bytearray(10 << 30)
breached()
""",
    "ten gigabytes by bits": """
blocks = [os.urandom(1 << 20) * 64 for _ in range(160)]
breached()
""",
    "memory files": """
for _ in range(40):
    descriptor = os.memfd_create("x")
    os.ftruncate(descriptor, 1 << 18)
breached()
""",
    "shared memory that stays": "if libc.shmget(0, 1 << 20, 0o1600) >= 0: breached()",
    "raise the limits": """
import resource
endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
for what in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    resource.setrlimit(what, endless)
breached()
""",
    "endless output": """
breached()
while True:
    print("x" * 65536)
""",
    "endless output without errors": """
breached()
while True:
    tried(lambda: os.write(1, b"x" * 65536))
""",
    "output past its limit": """
breached()
for _ in range(1000):
    tried(lambda: os.write(1, b" " * 65536))
""",
    "endless errors": """
breached()
while True:
    os.write(2, b"x" * 65536)
""",
    "fill the temporary folder": """
for number in range(1024):
    with open(f"/tmp/{mark}-{number}", "wb") as file:
        file.write(b"x" * (1 << 19))
breached()
""",
    "a hundred thousand files": """
for number in range(100_000):
    open(f"/tmp/{mark}-{number}", "w").close()
breached()
""",
    "huge file": """
with open("/tmp/" + mark, "wb") as file:
    file.truncate(1 << 40)
breached()
""",
    "thousands of descriptors": """
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(5000)]
breached()
""",
    "deep recursion": """
sys.setrecursionlimit(10**9)
def down(depth):
    max([depth + 1], key=down)
down(0)
breached()
""",
    "deep recursion in a thread": """
sys.setrecursionlimit(10**9)
threading.stack_size(1 << 29)
def down(depth):
    max([depth + 1], key=down)
threads = [threading.Thread(target=down, args=(0,)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
breached()
""",
}

# What must be out of sight

SIGHT = {
    "the network": """
import socket
with socket.create_connection(("127.0.0.1", told["port"]), timeout=1) as connection:
    connection.sendall(b"hello")
breached()
""",
    "names of the network": """
import socket
if socket.getaddrinfo("localhost", 80):
    breached()
""",
    "abstract sockets": """
import socket
socket.socket(socket.AF_UNIX).connect("\\0" + told["abstract"])
breached()
""",
    "another process's environment": """
if told["secret"] in open(f"/proc/{told['pid']}/environ").read():
    breached()
""",
    "another process's command line": """
if told["word"] in open(f"/proc/{told['pid']}/cmdline").read():
    breached()
""",
    "the environment": """
if set(os.environ) - {"LC_CTYPE", "PWD", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}:
    breached()
""",
    "the list of processes": 'if any(name.isdigit() for name in os.listdir("/proc")): breached()',
    "the repository": 'if open(told["file"]).read(): breached()',
    "users": 'if open("/etc/passwd").read(): breached()',
    "the repository by a symbolic link": """
os.chdir(told["scratch"] if os.path.isdir(told["scratch"]) else "/tmp")
os.symlink(told["file"], mark)
if open(mark).read():
    breached()
""",
    "the old root by ..": """
path = "../" * 64 + told["file"].lstrip("/")
if open(path).read():
    breached()
""",
    "write to the repository": """
open(told["repository"] + "/" + mark, "w").write("x")
breached()
""",
    "write to the system": """
places = ("/", "/usr/lib/", "/dev/", "/dev/shm/", "/var/tmp/", sys.prefix + "/lib/")
if any([tried(lambda: open(place + mark, "w")) for place in places]):
    breached()
""",
    "devices": """
import stat
device = (stat.S_IFCHR | 0o666, os.makedev(1, 1))
made = tried(lambda: os.mknod("/tmp/" + mark, *device) or True)
names = ("mem", "kmsg", "vda", "sda", "nvme0n1", "kvm", "fuse", "net/tun")
if made or any([tried(lambda: open("/dev/" + name, "rb")) for name in names]):
    breached()
""",
    "a user namespace of its own": "if libc.unshare(0x10000000) == 0: breached()",
    "a mount": 'if libc.mount(b"proc", b"/tmp", b"proc", 0, b"") == 0: breached()',
    "root": "if 0 in os.getresuid() or tried(lambda: os.setuid(0) or True): breached()",
    "the name of the machine": """
import socket
socket.sethostname(mark)
breached()
""",
}

# Pay for nothing. Here the program does not know the answer, which is a random number.

PAY = {
    "exit before the tests": "sys.exit(0)",
    "end before the tests": "os._exit(0)",
    "no output": "",
    "search all it sees": """
import gc, re
look = re.compile(r"answer-[0-9a-f]{32}")
texts = [repr(thing) for thing in gc.get_objects()] + sys.argv + list(os.environ)
frame = sys._getframe()
while frame:
    texts.append(repr(frame.f_locals))
    texts.append(repr(frame.f_globals))
    frame = frame.f_back
for folder, _, names in os.walk("/tmp"):
    texts += [tried(lambda: open(f"{folder}/{name}").read()) or "" for name in names]
for descriptor in range(1024):
    texts.append(str(tried(lambda: os.pread(descriptor, 1 << 20, 0))))
found = look.search("".join(texts))
if found:
    print(found[0])
""",
    "write to inherited descriptors": """
import struct
frame = struct.pack(">iI", 0, 8) + b"breached"
for descriptor in range(3, 1024):
    tried(lambda: os.write(descriptor, frame))
""",
    "a reply of its own": """
import struct
os.write(1, struct.pack(">iI", 0, 0))
os._exit(0)
""",
    "patch the server": """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == "Server":
        type(thing)._wait = lambda self, child: 0
        type(thing)._read = lambda self: b""
        thing._settings["output_bytes"] = 0
os.waitstatus_to_exitcode = lambda status: 0
""",
    "patch the comparison": """
import builtins, decimal
class Equal(str):
    def __eq__(self, other):
        return True
    __hash__ = str.__hash__
builtins.str = Equal
decimal.Decimal = lambda text: 0
json.loads = lambda text: Equal()
print(Equal("x"))
""",
    "fail with code 0": """
import atexit
atexit.register(os._exit, 0)
raise ValueError
""",
    "numbers that are no numbers": 'print("sNaN")',
    "a number to choke on": 'print("1e999999999 " * 1000 + "9" * 50000)',
}

# The same for tests that call `answer(n)`.

CALLS = {
    "an object equal to all": """
class Equal(list):
    def __eq__(self, other):
        return True
def answer(n):
    return Equal()
""",
    "a number equal to all": """
class Equal(float):
    def __eq__(self, other):
        return True
def answer(n):
    return Equal(1)
""",
    "patched json": """
import json
class Equal(list):
    def __eq__(self, other):
        return True
json.dumps = lambda value: "true"
json.loads = lambda text: Equal()
def answer(n):
    return 1
""",
    "print instead of return": """
def answer(n):
    print("answer")
""",
    "exit instead of return": """
import sys
def answer(n):
    sys.exit(0)
""",
    "end instead of return": """
import os
os._exit(0)
""",
    "no function": "x = 1",
    "not a number": """
def answer(n):
    return float("nan")
""",
    "no JSON": """
def answer(n):
    return {1, 2}
""",
    "nested without end": """
def answer(n):
    inner = []
    for _ in range(100_000):
        inner = [inner]
    return inner
""",
    "contains itself": """
def answer(n):
    inner = []
    inner.append(inner)
    return inner
""",
    "its own JSON, nested": """
import os
os.write(3, b"[" * 60_000)
os._exit(0)
""",
    "several values": """
import os
def answer(n):
    os.write(3, b"1 2 3")
    return 1
""",
}

# Not even Python, or too much of it.
SOURCES = {
    "no program": "this is not Python",
    "parentheses": "(" * 100_000,
    "signs": "x = " + "-" * 200_000 + "1",
    "a deep expression": "x = " + "+".join(["1"] * 200_000),
    "a deep list": "x = " + "[" * 90 + "]" * 90 + "\nprint('" + "x" * 10,
    "a huge constant": "x = " + "*".join(["9**9999"] * 100),
    "a null byte": "print('breached')\0",
    "half a character": "print('\ud800')",
}

HARMLESS = (
    *("one child", "another program", "a shell", "the environment", "the list of processes"),
    *("the network", "names of the network", "abstract sockets", "the repository", "users"),
    *("another process's environment", "another process's command line"),
    *("the repository by a symbolic link", "the old root by .."),
)

# Only the clock ends these.
ENDLESS = (
    *("stop itself", "ignore every signal", "sleep for ever", "compute for ever"),
    *("compute for ever in threads", "endless output without errors", "endless errors"),
)
