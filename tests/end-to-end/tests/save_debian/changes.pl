# Names that are hard to write, and attributes.
use strict;
use warnings;

my $SETXATTR = 189;
chdir '/srv' or die;
for my $name ("new\nline", "latin\xe9", "\xe2\x82\xac", '-dash', '--', ' ', 'a b ', "tab\t", "\x01\x7f",
    'back\\slash', '\'"', '*?[x]', '$(x)', '...', '.hidden', 'wh.', '=', 'n' x 255) {
    write_file("odd/$name", $name);
    mkdir "odd/in $name" if length $name < 200;
}
my $deep = join '/', 'deep', map { $_ x 200 } 'a' .. 'h';
write_file("$deep/file", 'deep');
link "$deep/file", "$deep/linked" or die;
symlink $deep, 'to-deep' or die;

write_file($_, $_) for qw(with-xattrs with-capability with-acl);
# An empty value would be none in an archive, by what its format says.
xattr('with-xattrs', 'user.small', 'v');
xattr('with-xattrs', "user.b\xe9", join '', map { chr } 0 .. 255);
xattr('with-xattrs', 'user.large', 'x' x 3000);
xattr('with-xattrs', 'user.line', "a\nb=c\0d");
xattr($_, 'user.of', $_) for qw(empty setgid a/second /usr/bin/cksum /etc/skel.moved /usr/share);
# cap_net_raw+ep
xattr($_, 'security.capability', pack 'V5', 0x0200_0001, 1 << 13, 0, 0, 0)
    for qw(with-capability /usr/bin/shred);
# user::rw- user:1000:rw- group::r-- mask::rw- other::r--
my @acl = ([1, 6, -1], [2, 6, 1000], [4, 4, -1], [16, 6, -1], [32, 4, -1]);
xattr('with-acl', 'system.posix_acl_access', pack 'V(vvl<)*', 2, map { @$_ } @acl);

sub write_file {
    my ($path, $content) = @_;
    my ($folder) = $path =~ m{\A(.*)/}s;
    my $made = '';
    for my $part (split m{/}, $folder // '') {
        $made .= "$part/";
        mkdir $made;
    }
    open my $file, '>', "./$path" or die "$path: $!";
    print $file $content;
}

sub xattr {
    my ($path, $name, $value) = @_;
    syscall($SETXATTR, $path, $name, $value, length $value, 0) == 0 or die "$path: $name: $!";
}
