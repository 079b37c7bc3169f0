"""The doors, one module each: the ways by which work gets onto a device that is not the owner's.

`table` lists them and describes their shape. They lie in four families, which do not import each other:

- `arrivals`: data arrives with the name of another device;
- `current_device`: a call means the current device, and the current device is the wrong one;
- `concurrency`: a thread or a process starts;
- `contexts`: a context, or the wrong physical GPU, is there.

May import reporting and the floors below it.
"""
