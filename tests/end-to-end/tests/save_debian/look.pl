# Prints all files of a tree but the volatile ones: path, facts and time, a line each, tabs between.
# What is a mount of its own is left out. For x86-64, whose numbers the system calls have.
#
# An overlay gives the names of one file different numbers, when it was another name's in a layer
# below. In one (`overlay`) files with more than one name are one file if they are equal in all.
use strict;
use warnings;
use Fcntl ':mode';

my ($root, $kind) = @ARGV;
chdir $root or die "$root: $!";
my %volatile = map { $_ => 1 }
    qw(dev etc/hostname etc/hosts etc/machine-id etc/resolv.conf proc run sys tmp);
my ($LISTXATTR, $GETXATTR) = (194, 191);
my ($names, $value) = ("\0" x 65536, "\0" x 65536);

my $device = (lstat '.')[0];
my (@found, %links, @regular);
my @todo = ('.');
while (defined(my $path = pop @todo)) {
    next if $volatile{$path};
    my @stat = lstat $path or die "$path: $!";
    my $is_folder = S_ISDIR($stat[2]);
    next if $is_folder && $stat[0] != $device;
    my %file = (path => $path, stat => \@stat, xattrs => xattrs($path));
    $file{target} = readlink $path if S_ISLNK($stat[2]);
    push @found, \%file;
    push @regular, $path if S_ISREG($stat[2]);
    next unless $is_folder;
    opendir my $folder, $path or die "$path: $!";
    my $in = $path eq '.' ? '' : "$path/";
    push @todo, map { $in . $_ } grep { !/\A\.\.?\z/ } readdir $folder;
}

my %hash = hashes(@regular);
for my $file (@found) {
    my @stat = @{ $file->{stat} };
    next if S_ISDIR($stat[2]) || $stat[3] < 2;
    my @equal = (@stat[2 .. 7, 9], $hash{ $file->{path} } // '', @{ $file->{xattrs} });
    $file->{is} = join ' ', $kind eq 'overlay' ? @equal : @stat[0, 1];
    push @{ $links{ $file->{is} } }, $file->{path};
}
for my $file (@found) {
    my ($path, $stat) = ($file->{path}, $file->{stat});
    my (undef, undef, $mode, undef, $uid, $gid, $rdev, $size, undef, $mtime) = @$stat;
    my @facts = (sprintf('%06o', S_ISLNK($mode) ? S_IFLNK | 0777 : $mode), $uid, $gid);
    push @facts, $size, $hash{$path} // die "$path has no hash" if S_ISREG($mode);
    push @facts, 'device', $rdev if S_ISCHR($mode) || S_ISBLK($mode);
    push @facts, '->', $file->{target} if S_ISLNK($mode);
    my @names = sort @{ $links{ $file->{is} // '' } // [] };
    push @facts, 'is', @names if @names > 1;
    push @facts, @{ $file->{xattrs} };
    print plain($path), "\t", join(' ', map { plain($_) } @facts), "\t$mtime\n";
}

# Bytes that would be taken for something else, in hexadecimal.
sub plain {
    my ($text) = @_;
    $text =~ s/([^!-\[\]-~])/sprintf '\\x%02x', ord $1/ge;
    return $text;
}

sub xattrs {
    my ($path) = @_;
    my $len = syscall $LISTXATTR, $path, $names, length $names;
    return [] if $len <= 0;
    my @all;
    for my $name (sort split /\0/, substr $names, 0, $len) {
        my $size = syscall $GETXATTR, $path, $name, $value, length $value;
        die "$path: $name: $!" if $size < 0;
        push @all, "$name=" . unpack 'H*', substr $value, 0, $size;
    }
    return \@all;
}

sub hashes {
    my @paths = @_;
    my $pid = open(my $hashed, '-|') // die "fork: $!";
    if ($pid == 0) {
        open my $xargs, '|-', 'xargs', '-0', 'sha256sum', '-z', '--' or die "xargs: $!";
        print $xargs "$_\0" for @paths;
        close $xargs or die "sha256sum: $!";
        exit 0;
    }
    local $/ = "\0";
    my %all;
    while (my $line = <$hashed>) {
        chomp $line;
        $all{ substr $line, 66 } = substr $line, 0, 64;
    }
    close $hashed or die "sha256sum failed";
    return %all;
}
