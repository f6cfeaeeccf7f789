"""What `--help` of commands about guests that are saved and restored says below their options."""

from __future__ import annotations

RESTORE_EPILOG = """\
ways
  (none)    all memory first, then the guest runs
  --lazy    the guest runs at once; its memory comes as it needs it, the rest behind it. If the repository is lost
            meanwhile, the guest waits, and goes on by itself when it is back ('vmferry jobs' says so)

  The stored disks stay as they are: each restore writes to overlays of its own. What the guest has in common with a
  VM that runs (UUID, addresses of its cards) is named; what would do harm is refused before anything is started.

a snapshot that was imported
  --spec FILE says what its guest is made of, as for 'vmferry run': name (or --as), memory, CPUs, cards, disks, in the
  order in which the guest had them. The machine type is the stream's; a spec that names another one is refused. Of the
  spec's disks the snapshot knows nothing: they have to be what they were when the guest was saved, or its memory and
  its disk do not belong together, so --accept unchecked-disk has to be said. The guest writes to overlays on them.
  A spec builds the machine that 'vmferry run' builds: QEMU refuses the state of a guest that had another one.

exit codes
  0 the guest runs (or is there, with --paused);  8 refused, nothing was made;  25 the repository, or something in it.
  All of them: 'vmferry exit-codes'.

examples
  vmferry restore monday --lazy
  vmferry restore monday --as web2 --on host-b --lazy
  vmferry restore web1-copy --spec web1.toml --accept unchecked-disk
"""
DISKS_EPILOG = """\
What a restored guest writes goes into files of its own (overlay), which stay when the guest has ended: it may be wanted
again. 'vmferry stop NAME --remove-disks' ends a guest for good, together with them.

What 'vmferry save --disks mirror' copied (copy) stays as long as nobody takes it away, also when its snapshot is
forgotten: guests that were restored from that may lie on it. One that a snapshot has, or on which something lies, is
needed, and is not removed. After 'vmferry forget' this list says which copies nobody needs any more.

examples
  vmferry disks
  vmferry disks --remove /var/lib/vmferry/disks/web2-1f0c9a3e-0.qcow2
"""
RUN_EPILOG = """\
A writable disk on which others lie is refused: an image that 'vmferry save --disks external-snapshot' left as it was,
one under the disks of a restored guest, or one that a qcow2 file beside it names as its backing file. What is written
to it damages them, and a snapshot that has it cannot be restored any more. The refusal says in which file the guest
went on and what to write into the spec; --accept base-image starts it on the old image all the same.

exit codes
  0 the guest runs;  3 the spec;  8 refused, nothing was started. All of them: 'vmferry exit-codes'.
"""
SAVE_EPILOG = """\
ways
  background  the guest stops for milliseconds, then its memory is taken while it goes on; pages that it is about to
              change are taken first. Needs QEMU 11.1 or newer (older ones may hang their guest when it breaks off), a
              kernel that can protect pages (userfaultfd), a guest that runs, no writable disk, and no --pause
  precopy     its memory is taken while it runs, as in a migration; then it stops for what is left and its devices
  auto        background where it can be had, else precopy (the default)

disks
  Read-only disks are fine. A guest that writes to a disk is refused, unless --disks says what shall become of it.

  mirror             each disk is copied while the guest runs, into a new file VM-diskN.NAME.stored.qcow2 beside it, or
                     in --disks-dir (for a disk that is a device it has to be said). The guest stands only for what it
                     wrote last, and goes on as before, on its own disk. Takes time and room for all that the disk
                     has. A guest that writes faster than it is copied is told so, and goes on unsaved
  external-snapshot  each image stays as it is at the instant of the snapshot, and the guest goes on in a new file
                     VM-diskN.NAME.qcow2 beside it. Takes no time and no room at first, and the guest has one more
                     file in its chain. Write the new file into the guest's spec: with the old image the guest would
                     begin in the past, and 'vmferry run' refuses that. The last lines of the save say what belongs
                     there

  The image that the snapshot names (the copy, or the old image) must stay where it is, unchanged, as long as the
  snapshot is to be restored. 'vmferry disks' lists copies, and who needs them.

Whatever happens (a full disk, a repository that is gone, an agent that dies), the guest goes on, and a save that did
not end leaves no snapshot, only objects that 'vmferry prune' takes away.

exit codes
  0 the snapshot is there;  8 refused, nothing was touched;  9 the VM is being migrated or saved;  11 failed, the guest
  goes on;  12 cancelled;  14 the guest is whole and paused, and QEMU does not start it;  25 the repository refuses.
  All of them: 'vmferry exit-codes'.

examples
  vmferry save web1 before-upgrade
  vmferry save db1 nightly --disks mirror --disks-dir /srv/copies
  vmferry save db1 nightly --disks external-snapshot --json | jq .downtime_ms
"""
INIT_EPILOG = """\
Once for each place that agents name with --repository, from one of them: no other command makes a repository there, so
that a file system that is not mounted, or a wrong name, is told and not filled. An agent without --repository needs
none of it. It is encrypted if the agent has a --repository-key. A repository that is there is left as it is.

exit codes
  0 there is one;  25 the place cannot be used, or has something else in it. All of them: 'vmferry exit-codes'.
"""
EXPORT_EPILOG = """\
The file is what a QEMU writes that migrates into a file: a QEMU of the same machine type loads it with
'-incoming file:FILE' (8.2 and newer) or '-incoming "exec:cat FILE"', and QEMU's own analyze-migration.py and
'vmferry inspect-stream' read it. The guest's disks are not in it, nor
what its machine is made of: to restore it from there a spec is needed ('vmferry restore --help').

exit codes
  0 it is there, whole;  2 there is a file of that name, or no such folder;  12 cancelled;  25 the repository
  refuses, or something in it is damaged;  26 the file cannot be written: no room, for example. Unless it is 0 nothing
  is left of it. All of them: 'vmferry exit-codes'.

examples
  vmferry export before-upgrade /var/tmp/web1.stream
  vmferry import /var/tmp/web1.stream web1-copy
"""
IMPORT_EPILOG = """\
Keeps what a QEMU wrote that migrated into a file, or what 'vmferry export' wrote. A stream does not say what its
machine is made of, nor which disks it had: 'vmferry restore NAME --spec FILE' does, and asks for --accept
unchecked-disk if the spec has disks.

exit codes
  0 it is kept;  2 there is no such file;  12 cancelled;  20 it is no whole stream;  25 the repository refuses, or has
  that name;  26 the file cannot be read. All of them: 'vmferry exit-codes'.

examples
  vmferry import /var/tmp/web1.stream web1-copy
  vmferry restore web1-copy --spec web1.toml
"""
