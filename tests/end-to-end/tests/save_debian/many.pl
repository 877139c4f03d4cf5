# Very many small files.
use strict;
use warnings;

mkdir '/srv/many' or die;
chdir '/srv/many' or die;
for my $folder (0 .. 99) {
    mkdir $folder or die;
    for my $number (0 .. 999) {
        open my $file, '>', "$folder/$number" or die;
        print $file "$folder $number\n";
    }
}
