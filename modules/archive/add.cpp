module;

module cobuild.archive;
