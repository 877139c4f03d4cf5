# Makes what no user namespace may have: device nodes, and attributes of the kernel's own. `undo`
# takes all of it back.
use strict;
use warnings;

my ($SETXATTR, $REMOVEXATTR) = (189, 197);
if ($ARGV[0] eq 'undo') {
    system('rm', '-r', '/srv/root', '/usr/lib/device') == 0 or die;
    my ($path, @names) = ('/usr/bin/nl', 'trusted.of', 'security.of');
    syscall($REMOVEXATTR, $path, $_) == 0 or die "$_: $!" for @names;
    exit 0;
}
mkdir '/srv/root' or die;
chdir '/srv/root' or die;
for ([qw(null c 1 3)], [qw(high c 511 1048575)], [qw(block b 7 0)], [qw(mode c 10 200)]) {
    system('mknod', @$_) == 0 or die;
}
chmod 0620, 'mode' or die;
mkdir 'folder' or die;
symlink 'target', 'symlink' or die;
system('mkfifo', 'fifo') == 0 or die;
system('mknod', '/usr/lib/device', 'c', '1', '7') == 0 or die;
for my $path (qw(null folder symlink fifo /usr/bin/nl)) {
    xattr($path, $_, "of $path") for 'trusted.of', 'security.of';
}

sub xattr {
    my ($path, $name, $value) = @_;
    syscall($SETXATTR, $path, $name, $value, length $value, 0) == 0 or die "$path: $name: $!";
}
